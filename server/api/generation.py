"""What completions and chat share: a body becomes GenerationRequests, whose streams become one stream of choices.

Every check that needs the engine's facts happens here, before anything is queued. Knows nothing of response formats.
Enter at `start`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from server.api.schemas import GenerationBody
from server.engines.base import ChunkStream, Engine, EngineInfo
from server.errors import (
    ContextLengthError,
    EngineStoppedError,
    GenerationError,
    InvalidRequestError,
    UnknownHeadError,
    UnknownModelError,
)
from server.types import (
    ControlParams,
    ControlSummary,
    FinishReason,
    GenerationChunk,
    GenerationRequest,
    SamplingParams,
    TokenLogprob,
    Usage,
)

_log = logging.getLogger("recontrol.access")
MAX_SEQUENCES = 256
MAX_NEW_TOKENS = 2**17
MAX_PROMPT_SCORES = 2**18
_LOGGED_USER_CHARS = 64
_MIN_LOGPROB = -9999.0


@dataclass(slots=True)
class Generation:
    """A started body: its prompts, and the merged stream of (prompt index, chunk)."""

    engine: Engine
    prompts: list[list[int]]
    num_choices: int
    streams: list[ChunkStream]
    completion_tokens: int = 0
    prompt_logprobs: dict[int, tuple[TokenLogprob | None, ...]] = field(default_factory=dict)
    """By prompt index, from before the prompt's first chunk is given out."""

    @property
    def usage(self) -> Usage:
        return Usage(sum(map(len, self.prompts)), self.completion_tokens)

    async def chunks(self) -> AsyncGenerator[tuple[int, GenerationChunk], None]:
        """(choice index over all prompts, chunk), as they come; closing this aborts what is unfinished.

        Raises GenerationError or EngineStoppedError when a choice ends in error or with the engine.
        """
        queue: asyncio.Queue[tuple[int, GenerationChunk | Exception]] = asyncio.Queue()
        pumps = [asyncio.create_task(_pump(i, stream, queue)) for i, stream in enumerate(self.streams)]
        num_open = len(self.streams) * self.num_choices
        try:
            while num_open:
                prompt_index, chunk = await queue.get()
                if isinstance(chunk, Exception):
                    raise chunk
                if chunk.finish_reason is FinishReason.ERROR:
                    raise GenerationError(chunk.error or "The request failed inside the engine.")
                if chunk.finish_reason is FinishReason.ABORT:
                    raise EngineStoppedError("The server stopped before the response was complete.")
                self.completion_tokens += len(chunk.token_ids)
                if chunk.prompt_logprobs is not None:
                    self.prompt_logprobs[prompt_index] = chunk.prompt_logprobs
                num_open -= chunk.finish_reason is not None
                yield prompt_index * self.num_choices + chunk.index, chunk
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            await self.close()

    async def close(self) -> None:
        """Abort what is unfinished; harmless when repeated, and needed when `chunks` may never have begun."""
        await _close(self.streams)


@dataclass(slots=True)
class Choice:
    """One finished choice."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason = FinishReason.STOP
    control: ControlSummary | None = None


async def collect(generation: Generation) -> list[Choice]:
    """All choices, whole and in order."""
    choices = [Choice() for _ in range(len(generation.prompts) * generation.num_choices)]
    async with contextlib.aclosing(generation.chunks()) as chunks:
        async for index, chunk in chunks:
            choice = choices[index]
            choice.text += chunk.text
            choice.logprobs += chunk.logprobs
            if chunk.finish_reason is not None:
                choice.finish_reason, choice.control = chunk.finish_reason, chunk.control
    return choices


async def start(
    engine: Engine,
    body: GenerationBody,
    prompts: list[list[int]],
    *,
    request_id: str,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: bool = False,
) -> Generation:
    """Check everything, then queue a request for each prompt. Raises a RecontrolError with nothing left queued."""
    info = engine.info
    control = resolve_control(body, info)
    num_choices = body.n or 1
    check_size(prompts, num_choices, max_tokens, info)
    if prompt_logprobs:
        check_scored(prompts, num_choices, logprobs or 0)
    sampling = SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(body.top_k or 0, 0),
        seed=body.seed,
        stop=tuple(body.stop or ()),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )
    # repr keeps a user's line breaks and escapes inside one log line.
    user = None if body.user is None else repr(body.user[:_LOGGED_USER_CHARS])
    _log.info("request=%s model=%s prompts=%d n=%d user=%s", request_id, body.model, len(prompts), num_choices, user)
    streams: list[ChunkStream] = []
    try:
        for index, prompt in enumerate(prompts):
            streams.append(
                engine.generate(
                    GenerationRequest(
                        request_id=f"{request_id}-{index}",
                        prompt_token_ids=tuple(prompt),
                        sampling=sampling,
                        control=control,
                        num_choices=num_choices,
                    )
                )
            )
    except BaseException:
        await _close(streams)
        raise
    return Generation(engine, prompts, num_choices, streams)


def resolve_control(body: GenerationBody, info: EngineInfo) -> ControlParams | None:
    """The body's control, or the default one behind `base@head`. Raises UnknownModelError, UnknownHeadError."""
    # The base's own id may hold an "@", so it is compared whole.
    head = body.model.removeprefix(f"{info.model_id}@")
    if body.model != info.model_id and head in ("", body.model):
        raise UnknownModelError(body.model, model_ids(info))
    if body.model != info.model_id:
        if body.control is not None:
            raise InvalidRequestError(
                f"control: the model id {body.model!r} already chooses an objective; use {info.model_id!r} with "
                "control",
                param="control",
            )
        if head not in info.heads:
            raise UnknownHeadError(head, info.heads, param="model")
        return ControlParams.for_head(head)
    if body.control is not None:
        for name in body.control.objective.head_names:
            if name not in info.heads:
                raise UnknownHeadError(name, info.heads, param="control.objective.weights")
    return body.control


def model_ids(info: EngineInfo) -> list[str]:
    """The base model, and one id for each head's default objective."""
    return [info.model_id, *(f"{info.model_id}@{name}" for name in info.heads)]


def check_token_ids(prompts: Sequence[Sequence[int]], info: EngineInfo) -> None:
    """Ids that a request gives: an engine must never see, not even to decode, one outside the vocabulary."""
    for token_id in itertools.chain.from_iterable(prompts):
        if not 0 <= token_id < info.vocab_size:
            raise InvalidRequestError(
                f"prompt: token id {token_id} is outside the vocabulary, 0 to {info.vocab_size - 1}", param="prompt"
            )


def check_size(prompts: Sequence[Sequence[int]], num_choices: int, max_tokens: int, info: EngineInfo) -> None:
    """Lengths, and the caps on what one body may ask for in all."""
    num_sequences = len(prompts) * num_choices
    if num_sequences > MAX_SEQUENCES:
        raise InvalidRequestError(
            f"n: {len(prompts)} prompts x n = {num_sequences} sequences; at most {MAX_SEQUENCES} are allowed", param="n"
        )
    for prompt in prompts:
        if len(prompt) + max_tokens > info.max_model_len:
            raise ContextLengthError(
                f"The prompt has {len(prompt)} tokens and max_tokens is {max_tokens}; together they must not exceed "
                f"{info.max_model_len}.",
                param="max_tokens",
            )
    if num_sequences * max_tokens > MAX_NEW_TOKENS:
        raise InvalidRequestError(
            f"max_tokens: {num_sequences} sequences x {max_tokens} tokens exceed the {MAX_NEW_TOKENS} new tokens that "
            "one request may ask for",
            param="max_tokens",
        )


def check_scored(prompts: Sequence[Sequence[int]], num_choices: int, num_top: int) -> None:
    """The cap on log-probabilities of prompts, which come without a new token being drawn."""
    num_scores = sum(map(len, prompts)) * num_choices * (num_top + 1)
    if num_scores > MAX_PROMPT_SCORES:
        raise InvalidRequestError(
            f"logprobs: with echo this asks for {num_scores} log-probabilities of prompt tokens (tokens x n x "
            f"(logprobs + 1)); at most {MAX_PROMPT_SCORES} are allowed",
            param="logprobs",
        )


def shown_logprob(logprob: float) -> float:
    """JSON has no -inf; -9999.0 stands for it, as in vLLM."""
    return max(logprob, _MIN_LOGPROB)


async def _pump(index: int, stream: ChunkStream, queue: asyncio.Queue[tuple[int, GenerationChunk | Exception]]) -> None:
    try:
        async for chunk in stream:
            queue.put_nowait((index, chunk))
    except Exception as error:
        queue.put_nowait((index, error))


async def _close(streams: Sequence[ChunkStream]) -> None:
    for stream in streams:
        await stream.aclose()
