"""What all routes that generate share: a body becomes GenerationRequests, whose streams become one stream of choices.

Every check happens before anything is queued (`resolution.py`). Knows nothing of response formats. Enter at `start`, or
at `queue` with requests that do not come from a body of theirs.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from fastapi import Request

from server.api.gate.context import context_of
from server.api.gate.limits import Charge
from server.api.messages import ChatMessage
from server.api.pinned import check_beside_pinned
from server.api.resolution import (
    check_scored,
    check_size,
    check_told,
    resolve_best_of,
    resolve_control,
    resolve_phase,
    sampling_params,
    with_replacement,
    with_rest_of_context,
)
from server.api.schemas import GenerationBody
from server.api.structure import structure_of
from server.api.tools import ToolPlan
from server.api.workers import Workers
from server.calls.calls import Call, CallDelta
from server.control.levels import UNCALIBRATED, uncalibrated
from server.control.turns import Turn
from server.engines.base import ChunkStream, Engine, EngineInfo
from server.errors import (
    DeadlineExceededError,
    EngineStoppedError,
    GenerationError,
    ShuttingDownError,
    SlowReaderError,
)
from server.telemetry import Telemetry
from server.types import (
    ChatRendering,
    ControlSummary,
    FinishReason,
    GenerationChunk,
    GenerationRequest,
    Opening,
    PromptValues,
    Segment,
    TokenLogprob,
    TopLogprob,
    Usage,
)

LEAST_NEW_TOKENS = 16
"""Of a text whose length the caller left open; with fewer in the minute's rest there is a 429 and no useless text."""
_MIN_LOGPROB = -9999.0
_Result = TypeVar("_Result")
_MAX_UNREAD = 2**15
"""Of a stream whose client does not read it: tokens and log-probabilities, some 10 MB of them."""


@dataclass(slots=True)
class Generation:
    """A started body: its prompts, and the merged stream of (prompt index, chunk)."""

    engine: Engine
    prompts: list[list[int]]
    num_choices: int
    streams: list[ChunkStream]
    charge: Charge | None
    timeout_s: float | None
    is_traced: bool
    heads: Sequence[str]
    """Those that it runs under."""
    first_warnings: list[str]
    """Of its heads, when it was queued, and of those that are uncalibrated."""
    telemetry: Telemetry
    workers: Workers
    facts: dict[str, Any]
    """Of the access line; gets the usage at the end."""
    hides_reasoning: bool = False
    """Whether nothing of a reasoning token is told but that it was drawn."""
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    """Of these; marks count as what they mark."""
    num_told: int = 0
    """Tokens and log-probabilities of the chunks that were given out."""
    num_drawn: int = 0
    """Tokens of the usage that the engine told of, whether or not anybody reads them."""
    num_held: int = 0
    """Beside them, tokens that a guardrail holds back or has taken back: they are paid for too."""
    num_instructed_tokens: int = 0
    """Of prompts behind the instruction that control follows. They are paid for, and each new token then twice."""
    prompt_logprobs: dict[int, tuple[TokenLogprob | None, ...]] = field(default_factory=dict)
    """By prompt index, from before the prompt's first chunk is given out."""

    @property
    def usage(self) -> Usage:
        return Usage(sum(map(len, self.prompts)), self.completion_tokens, self.reasoning_tokens)

    @property
    def size(self) -> int:
        """Of the answer: tokens and log-probabilities."""
        return self.num_told + sum(map(len, self.prompt_logprobs.values()))

    @property
    def warnings(self) -> list[str]:
        """What to know of heads that were made for another model, also of those that came or went meanwhile."""
        return list(dict.fromkeys([*self.first_warnings, *self.engine.info.warnings(self.heads)]))

    def control_shown(self, control: ControlSummary) -> dict[str, Any]:
        """A choice's summary, with the warnings of its heads where there are any."""
        summary = shown(control.as_dict())
        return {**summary, "warnings": warnings} if (warnings := self.warnings) else summary

    async def chunks(self) -> AsyncGenerator[tuple[int, GenerationChunk], None]:
        """(choice index over all prompts, chunk), as they come; closing this aborts what is unfinished.

        Raises GenerationError or EngineStoppedError when a choice ends in error or with the engine,
        DeadlineExceededError when the time is over, and SlowReaderError when whoever reads this falls too far behind.
        """
        queue = _Backlog()
        pumps = [asyncio.create_task(self._pump(i, stream, queue)) for i, stream in enumerate(self.streams)]
        if self.timeout_s is not None:
            pumps.append(asyncio.create_task(self._end_in(self.timeout_s, queue)))
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
                self.completion_tokens += chunk.num_drawn
                self.reasoning_tokens += chunk.num_drawn if chunk.segment is Segment.REASONING else 0
                self.num_told += _size(chunk)
                if self.hides_reasoning:
                    chunk = _without_reasoning(chunk)
                if chunk.prompt_logprobs is not None:
                    self.prompt_logprobs[prompt_index] = chunk.prompt_logprobs
                if not (chunk.token_ids or chunk.text or chunk.reasoning or chunk.finish_reason):
                    continue  # It only counts.
                num_open -= chunk.finish_reason is not None
                yield prompt_index * self.num_choices + chunk.index, chunk
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            await self.close()

    def traced(self, chunk: GenerationChunk) -> list[dict[str, Any]]:
        """What control did to the chunk's token, if that was asked for."""
        if not self.is_traced or chunk.edit is None:
            return []
        return [{"token_id": chunk.token_ids[0], **shown(asdict(chunk.edit))}]

    async def close(self) -> None:
        """Abort what is unfinished; harmless when repeated, and needed when `chunks` may never have begun."""
        await _close(self.streams)
        prompt_tokens = self.usage.prompt_tokens
        if self.charge is not None:
            rows = 2 if self.num_instructed_tokens else 1
            num_new = self.num_drawn + self.num_held
            self.charge.settle(prompt_tokens + self.num_instructed_tokens + rows * num_new)
        self.facts |= {"prompt_tokens": prompt_tokens, "completion_tokens": self.num_drawn}

    async def _pump(self, index: int, stream: ChunkStream, queue: _Backlog) -> None:
        try:
            async for chunk in stream:
                self.num_drawn += chunk.num_drawn
                self.num_held += chunk.num_held
                self.telemetry.count_usage(generation_tokens=chunk.num_drawn)
                if queue.size > _MAX_UNREAD:
                    await self._end(queue, SlowReaderError("The response was not read as fast as it came."))
                    return
                queue.put(index, chunk)
        except Exception as error:
            queue.put(index, error)

    async def _end_in(self, timeout_s: float, queue: _Backlog) -> None:
        await asyncio.sleep(timeout_s)
        await self._end(queue, DeadlineExceededError(f"The response was not complete after {timeout_s:g} s."))

    async def _end(self, queue: _Backlog, error: Exception) -> None:
        # Before the streams are closed, whose choices then end as aborted.
        queue.put(0, error)
        await _close(self.streams)


class _Backlog:
    """What has come of a body's streams and was not read yet."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[tuple[int, GenerationChunk | Exception]] = asyncio.Queue()
        self.size = 0
        """Tokens and log-probabilities."""

    def put(self, index: int, chunk: GenerationChunk | Exception) -> None:
        self.size += _size(chunk)
        self._queue.put_nowait((index, chunk))

    async def get(self) -> tuple[int, GenerationChunk | Exception]:
        if not self._queue.empty():
            # Else a long backlog, read at one go, would hold up everybody else.
            await asyncio.sleep(0)
        index, chunk = await self._queue.get()
        self.size -= _size(chunk)
        return index, chunk


def _size(chunk: GenerationChunk | Exception) -> int:
    if isinstance(chunk, Exception):
        return 0
    return 1 + sum(1 + len(score.top) for score in (*chunk.logprobs, *(chunk.prompt_logprobs or ())) if score)


@dataclass(slots=True)
class Choice:
    """One choice, whole once it has a last chunk."""

    text: str = ""
    reasoning: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason = FinishReason.STOP
    control: ControlSummary | None = None
    trace: list[dict[str, Any]] = field(default_factory=list)
    prompt_values: PromptValues | None = None
    calls: list[Call] = field(default_factory=list)

    def grow(self, chunk: GenerationChunk, trace: list[dict[str, Any]]) -> None:
        """By the choice's next chunk, and what control did to its token."""
        self.text += chunk.text
        self.reasoning += chunk.reasoning
        for delta in chunk.calls:
            self._add_call(delta)
        self.logprobs += chunk.logprobs
        self.trace += trace
        if chunk.finish_reason is not None:
            self.finish_reason, self.control = chunk.finish_reason, chunk.control
            self.prompt_values = chunk.prompt_values

    def _add_call(self, delta: CallDelta) -> None:
        if delta.name is not None:
            self.calls.append(Call(delta.name, ""))
        self.calls[-1] = replace(self.calls[-1], arguments=self.calls[-1].arguments + delta.arguments)


async def collect(generation: Generation) -> list[Choice]:
    """All choices, whole and in order."""
    choices = [Choice() for _ in range(len(generation.prompts) * generation.num_choices)]
    async with contextlib.aclosing(generation.chunks()) as chunks:
        async for index, chunk in chunks:
            choices[index].grow(chunk, generation.traced(chunk))
    return choices


async def tokenized(request: Request, read: Callable[[], _Result], *, is_all: bool = False) -> _Result:
    """What `read` makes of a body's texts, off the event loop.

    The caller pays before it is done. What it paid is given back when it is, since `queue` then charges for the tokens,
    unless this is all that was asked. Raises RateLimitError, OverloadedError, and what `read` raises.
    """
    workers: Workers = request.app.state.workers
    context = context_of(request)
    charge = None if context.caller is None else await context.caller.pay_reading(context.num_body_bytes)
    result = await workers.run(read, size=context.num_body_bytes)
    if charge is not None and not is_all:
        charge.settle(0)
    return result


@dataclass(slots=True, frozen=True)
class ReadChat:
    """A conversation's token ids, alone and behind the instruction that control follows, if it does."""

    prompt: list[int]
    instructed: list[int] | None
    opening: Opening | None
    """How the response to it begins."""


async def read_chat(
    request: Request, body: GenerationBody, messages: Sequence[ChatMessage], rendering: ChatRendering
) -> ReadChat:
    """Raises as `tokenized` does."""
    engine: Engine = request.app.state.engine

    def read() -> ReadChat:
        plain = ChatMessage.plain(messages)
        prompt, instruction = engine.encode_chat(plain, rendering), body.instruction
        instructed = None if instruction is None else engine.encode_instructed(instruction, prompt, plain, rendering)
        return ReadChat(prompt, instructed, engine.opening(plain, rendering))

    return await tokenized(request, read)


async def start(
    request: Request,
    body: GenerationBody,
    prompts: list[list[int]],
    *,
    max_tokens: int | None,
    logprobs: int | None,
    instructed: list[list[int]] | None = None,
    prompt_logprobs: bool = False,
    best_of: int | None = None,
    opening: Opening | None = None,
    hides_reasoning: bool = False,
    tools: ToolPlan | None = None,
    turn: Turn | None = None,
) -> Generation:
    """Check everything, then queue a request for each prompt; `max_tokens` None asks for the rest of the context.

    `opening` is how responses begin that are told apart into reasoning and answer, `turn` where one stands in its
    conversation, if there is any, and `instructed` are the prompts behind the instruction that control follows. Raises
    a RecontrolError with nothing left queued.
    """
    state = request.app.state
    engine: Engine = state.engine
    info, num_choices = engine.info, body.num_choices
    control = resolve_control(body, info, state.pinned, turn)
    control = with_replacement(resolve_phase(control, opening, info), state.guardrail_replacement)
    held = tools if tools is not None and tools.structure is not None else None
    if state.pinned is not None:
        check_beside_pinned(body, state.pinned_refuses)
    asked = GenerationRequest(
        request_id="",
        prompt_token_ids=(),
        sampling=sampling_params(
            body, info, max_tokens=max_tokens or 0, logprobs=logprobs, prompt_logprobs=prompt_logprobs
        ),
        control=control,
        num_choices=num_choices,
        structure=await (structure_of(body.structures, engine) if held is None else held.compile(engine)),
        calls=tools and tools.rules,
        best_of=resolve_best_of(best_of, num_choices, control),
        opening=opening,
    )
    if max_tokens is None:
        longest, instructed_longest = (max(map(len, some), default=0) for some in (prompts, instructed or ()))
        asked = with_rest_of_context(asked, longest, info, field=body.size_field, num_instructed=instructed_longest)
    requests = requests_for(request, prompts, asked)
    if instructed is not None:
        requests = [
            replace(one, instructed_token_ids=tuple(ids)) for one, ids in zip(requests, instructed, strict=True)
        ]
    check_size(requests, info, field=body.size_field)
    if not body.stream:
        check_told(requests)
    if prompt_logprobs:
        check_scored(prompts, num_choices, logprobs or 0)
    user = body.safety_identifier if body.user is None else body.user
    context_of(request).facts |= {"model": body.model, "prompts": len(prompts), "n": num_choices, "user": user}
    generation = await queue(
        request, requests, timeout_s=body.timeout_s, size_field=body.size_field, takes_less=max_tokens is None
    )
    generation.hides_reasoning = hides_reasoning
    generation.first_warnings += _of_uncalibrated(body, info)
    return generation


def _of_uncalibrated(body: GenerationBody, info: EngineInfo) -> list[str]:
    """What to know of heads whose target or floor cannot be a reward."""
    if body.control is None:
        return []
    heads = uncalibrated(body.control, info.calibrations(body.control.heads_objective.head_levels))
    return [UNCALIBRATED.format(name=name) for name in heads]


def requests_for(request: Request, prompts: list[list[int]], asked: GenerationRequest) -> list[GenerationRequest]:
    """What is asked, of each prompt, in the name of the caller."""
    context = context_of(request)
    salt = request.app.state.cache_salt.of(request)
    return [
        replace(
            asked,
            request_id=f"{context.request_id}-{index}",
            prompt_token_ids=tuple(prompt),
            cache_salt=salt,
        )
        for index, prompt in enumerate(prompts)
    ]


async def queue(
    request: Request,
    requests: list[GenerationRequest],
    *,
    timeout_s: float | None,
    size_field: str = "max_tokens",
    takes_less: bool = False,
) -> Generation:
    """Queue requests that differ in their prompts alone; everything but the caller's limits must have been checked.

    `size_field` is the one that is named when a body is larger than a minute's worth of tokens. With `takes_less` the
    caller has not said how many new tokens, so there are as many as the minute has left. Raises a RecontrolError with
    nothing left queued.
    """
    state, context = request.app.state, context_of(request)
    engine: Engine = state.engine
    if state.is_draining:
        raise ShuttingDownError("The server is shutting down; it takes no new requests.")
    charge = None
    if context.caller is not None:
        max_tokens = requests[0].sampling.max_tokens
        least = _num_tokens(requests, min(max_tokens, LEAST_NEW_TOKENS)) if takes_less else None
        charge = await context.caller.pay(_num_tokens(requests, max_tokens), least=least, field=size_field)
        requests = _within(requests, charge.tokens)
    streams: list[ChunkStream] = []
    try:
        for generation_request in requests:
            streams.append(engine.generate(generation_request))
    except BaseException:
        await _close(streams)
        if charge is not None:
            charge.settle(0)
        raise
    heads = sorted(requests[0].named_heads)
    timeouts = [most_s for most_s in (timeout_s, state.request_timeout_s) if most_s is not None]
    generation = Generation(
        engine=engine,
        prompts=[list(one.prompt_token_ids) for one in requests],
        num_instructed_tokens=sum(len(one.instructed_token_ids) for one in requests),
        num_choices=requests[0].num_choices,
        streams=streams,
        charge=charge,
        timeout_s=min(timeouts, default=None),
        is_traced=any(one.control is not None and one.control.trace for one in requests),
        heads=heads,
        first_warnings=engine.info.warnings(heads),
        telemetry=state.telemetry,
        workers=state.workers,
        facts=context.facts,
    )
    generation.telemetry.count_usage(prompt_tokens=generation.usage.prompt_tokens)
    return generation


def _num_tokens(requests: Sequence[GenerationRequest], max_tokens: int) -> int:
    """Of the prompts, and new ones where each text gets so many, with those that guardrails may take back; with an
    instruction both are read twice."""
    num_prompt_tokens = sum(len(one.prompt_token_ids) + len(one.instructed_token_ids) for one in requests)
    return num_prompt_tokens + sum(one.num_rows * (max_tokens + one.max_redrawn) for one in requests)


def _within(requests: list[GenerationRequest], num_tokens: int) -> list[GenerationRequest]:
    """With so many new tokens that all of them, and the prompts, are what was paid for."""
    max_tokens = requests[0].sampling.max_tokens
    if num_tokens >= _num_tokens(requests, max_tokens):
        return requests
    max_tokens = (num_tokens - _num_tokens(requests, 0)) // sum(one.num_rows for one in requests)
    sampling = requests[0].sampling.model_copy(update={"max_tokens": max_tokens})
    return [replace(one, sampling=sampling) for one in requests]


def shown(value: Any) -> Any:
    """Figures of heads as JSON has them: it has no NaN and no infinity, so null stands for both."""
    if isinstance(value, dict):
        return {name: shown(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [shown(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shown_logprob(logprob: float) -> float:
    """JSON has no -inf; -9999.0 stands for it, as in vLLM."""
    return max(logprob, _MIN_LOGPROB)


def shown_logprobs(scores: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Scored tokens as chats and responses have them."""
    return [{**_scored(score), "top_logprobs": [_scored(other) for other in score.top]} for score in scores]


def _scored(score: TokenLogprob | TopLogprob) -> dict[str, Any]:
    return {"token": score.text, "logprob": shown_logprob(score.logprob), "bytes": list(score.data)}


def _without_reasoning(chunk: GenerationChunk) -> GenerationChunk:
    if chunk.segment is not Segment.REASONING:
        return replace(chunk, reasoning="")
    return replace(chunk, reasoning="", token_ids=(), logprobs=(), edit=None)


async def _close(streams: Sequence[ChunkStream]) -> None:
    for stream in streams:
        await stream.aclose()
