"""An engine without a model, for tests of clients and of the HTTP layer: same protocol, made-up text.

Tokens are bytes; the text is a pseudo-random string of letters keyed by seed, choice and prompt, so it is deterministic
and independent of what else runs. A text that is held to calls of tools calls the first without arguments. What ends a
text is obeyed; control and sampling are checked but move nothing, and candidates are counted but not drawn. It can be
told to reason before it answers.
"""

from __future__ import annotations

import asyncio
import hashlib
import struct
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from server.calls.formats import FORMATS
from server.calls.structure import CallStructure
from server.control.state import EditFigures
from server.engines.base import (
    ChunkStream,
    EngineInfo,
    EngineObserver,
    EngineStatus,
    NullObserver,
    TrainingSources,
)
from server.engines.checks import check_request
from server.engines.choice import Choice
from server.engines.segments import FORMATS as REASONING_FORMATS
from server.engines.segments import Markup
from server.engines.tool_prompt import with_tool_prompt
from server.errors import (
    EngineStoppedError,
    GenerationError,
    OverloadedError,
    UnknownHeadError,
    UnsupportedFieldError,
)
from server.types import (
    ChatRendering,
    FinishReason,
    GenerationChunk,
    GenerationRequest,
    Opening,
    PromptValues,
    TokenLogprob,
    TokenText,
    TopLogprob,
)

_LETTERS = b"etaoin shrdlu"
_END = 0
"""The token that ends a text."""
_MARKS = ("<think>", "</think>")
_THINK = REASONING_FORMATS["think"]
_FAILED = "The fake engine failed as told."
_CARD: dict[str, Any] = {"description": "a made-up head", "reward": "none"}


_UNMOVED = EditFigures(kl=0.0, shift_ratio=0.0, held_by=0.0, is_nonfinite=0.0, is_gate_open=1.0)


class _Letters:
    """A token's number is its letter's."""

    def add(self, token_id: int) -> TokenText:
        return TokenText(chr(token_id), chr(token_id).encode())

    def peek(self, token_id: int) -> TokenText:
        return replace(self.add(token_id), text="")

    def flush(self) -> str:
        return ""

    def copy(self) -> _Letters:
        return self


class FakeEngine:
    """`num_open` counts accepted requests that have not ended; `fail_after` makes every choice end in error there.

    `spare_heads` lie in its folder, so to speak, and can be loaded; `rewards` are registered for searches. With `text`,
    in ASCII, every answer is that text. `value_of` says what every head's value is at a token, given its place and the
    guardrail's retries so far. With `reasoning_tokens`, chats reason for so many letters first, between marks of
    several tokens each, of which the prompt has the first if it `opens_reasoning`.
    """

    def __init__(
        self,
        *,
        observer: EngineObserver | None = None,
        heads: Sequence[str] = ("positive", "plain"),
        spare_heads: Sequence[str] = ("kind",),
        rewards: Sequence[str] = (),
        token_delay_s: float = 0.0,
        fail_after: int | None = None,
        max_open: int = 1024,
        text: str | None = None,
        call_format: str = "hermes",
        reasoning_tokens: int | None = None,
        opens_reasoning: bool = False,
        value_of: Callable[[int, int], float] = lambda place, num_retries: 0.5,  # noqa: ARG005
    ) -> None:
        self.info = EngineInfo(
            "fake",
            max_model_len=4096,
            vocab_size=256,
            can_score=True,
            heads={name: dict(_CARD) for name in heads},
            call_format=FORMATS[call_format],
            marks_reasoning=reasoning_tokens is not None,
            search_rewards=tuple(rewards),
        )
        self._reasoning_tokens = reasoning_tokens or 0
        self._opens_reasoning = opens_reasoning
        self._value_of = value_of
        self._text = text
        self.num_open = 0
        self._known_heads = (*heads, *spare_heads)
        self._observer = observer or NullObserver()
        self._token_delay_s = token_delay_s
        self._fail_after = fail_after
        self._max_open = max_open
        self._is_running = False

    async def start(self) -> None:
        self._is_running = True

    async def stop(self) -> None:
        self._is_running = False

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        del add_special_tokens
        return list(text.encode())

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], rendering: ChatRendering | None = None) -> list[int]:
        if self.info.call_format is not None:
            tools = () if rendering is None else rendering.tools
            messages = with_tool_prompt(messages, tools, self.info.call_format, has_system=True)
        text = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        if rendering is not None and rendering.continue_final_message:
            return self.encode(text.removesuffix("\n"))
        return self.encode(text + self._begun_turn(messages, rendering))

    def encode_instructed(
        self,
        text: str,
        prompt_token_ids: Sequence[int],
        messages: Sequence[Mapping[str, Any]] | None = None,
        rendering: ChatRendering | None = None,
    ) -> list[int]:
        if messages is None:
            return [*self.encode(f"{text}\n\n"), *prompt_token_ids]
        return self.encode_chat([{"role": "system", "content": text}, *messages], rendering)

    def opening(self, messages: Sequence[Mapping[str, Any]], rendering: ChatRendering | None = None) -> Opening | None:
        if not self.info.marks_reasoning:
            return None
        turn = self._begun_turn(messages, rendering)
        continues = rendering is not None and rendering.continue_final_message
        return _THINK.opening(turn, is_begun=continues and bool(turn.strip()))

    def _begun_turn(self, messages: Sequence[Mapping[str, Any]], rendering: ChatRendering | None) -> str:
        rendering = rendering or ChatRendering()
        if rendering.continue_final_message:
            return messages[-1]["content"]
        begin, end = _MARKS
        if rendering.variables.get("enable_thinking") is False:
            return begin + end
        return begin if self._opens_reasoning and rendering.add_generation_prompt else ""

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token_ids).decode(errors="replace")

    def texts_alone(self, token_ids: Sequence[int]) -> list[str]:
        return [self.decode([token_id]) for token_id in token_ids]

    def token_texts(self, token_ids: Sequence[int]) -> list[TokenText]:
        return [_Letters().add(token_id) for token_id in token_ids]

    def tokenizer_info(self) -> dict[str, Any]:
        names = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template")
        return {"tokenizer_class": "FakeTokenizer", **dict.fromkeys(names)}

    def status(self) -> EngineStatus:
        return EngineStatus(self._is_running, num_running=self.num_open, num_waiting=0, kv_cache_usage=0.0)

    async def compile_schema(self, schema: str) -> object:
        del schema
        raise UnsupportedFieldError("the fake engine has no structured output")

    async def compile_choices(self, choices: Sequence[str]) -> object:
        del choices
        raise UnsupportedFieldError("the fake engine has no structured output")

    async def compile_calls(self, structure: CallStructure) -> object:
        return structure.frame.write([(next(iter(structure.schemas)), {})]) if structure.is_forced else None

    def generate(self, request: GenerationRequest) -> ChunkStream:
        if not self._is_running:
            raise EngineStoppedError("The engine is not running.")
        if self.num_open >= self._max_open:
            raise OverloadedError(f"{self.num_open} requests run already; try again later.")
        info = self.info
        check_request(
            request,
            heads=info.heads,
            vocab_size=info.vocab_size,
            max_model_len=info.max_model_len,
            rewards=info.search_rewards,
        )
        self.num_open += 1
        return _FakeStream(self, request, self._chunks(request))

    async def load_head(self, name: str) -> None:
        if name not in self._known_heads:
            raise UnknownHeadError(name, self._known_heads)
        self.info = self.info.with_head(name, dict(_CARD), None)

    async def unload_head(self, name: str) -> None:
        if name not in self.info.heads:
            raise UnknownHeadError(name, self.info.heads)
        self.info = self.info.without_head(name)

    def training_sources(self, check: Callable[[], None]) -> TrainingSources:
        del check
        raise UnsupportedFieldError("heads: the fake engine trains none, since it has no model")

    def forget(self, num_unfinished: int) -> None:
        """A stream has been closed with this many choices unfinished: they end as aborted."""
        self.num_open -= 1
        for _ in range(num_unfinished):
            self._observer.on_finish(
                reason=FinishReason.ABORT, e2e_s=0.0, decode_s=None, prompt_tokens=0, generation_tokens=0
            )

    async def _chunks(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        for index in range(request.num_choices):
            async for chunk in self._choice(request, index):
                yield chunk

    async def _choice(self, request: GenerationRequest, index: int) -> AsyncIterator[GenerationChunk]:
        sampling, now_s = request.sampling, time.monotonic()
        choice = Choice.of(
            request, index, detokenizer=_Letters(), eos_token_ids=(_END,), observer=self._observer,
            markup=Markup(_THINK) if self.info.marks_reasoning else None, arrival_s=now_s, scheduled_s=now_s,
        )  # fmt: skip
        scores = (None, *map(self._logprob, request.prompt_token_ids[1:])) if sampling.prompt_logprobs else None
        if sampling.max_tokens == 0:
            end = GenerationChunk(index, prompt_logprobs=scores if index == 0 else None)
            yield await self._prompt_end(choice, end)
        while not choice.is_finished:
            await asyncio.sleep(self._token_delay_s)
            if not self._is_running:
                yield choice.finish(FinishReason.ABORT)
                break
            for chunk in self._grown(choice, scores if index == 0 else None):
                yield chunk
        assert choice.finish_reason is not None
        choice.observe_finish(choice.finish_reason, time.monotonic(), prompt_tokens=len(request.prompt_token_ids))

    def _grown(self, choice: Choice, scores: tuple[TokenLogprob | None, ...] | None) -> list[GenerationChunk]:
        """What goes out when one more token was drawn."""
        position, guard = len(choice.token_ids), choice.guard
        num_retries = 0 if guard is None else guard.num_retries
        numbers = (
            None
            if not choice.is_controlled or choice.totals is None
            else [*[self._value_of(position, num_retries)] * (2 * len(choice.totals.names)), *_UNMOVED]
        )
        if guard is not None and numbers is not None and choice.breaks_guard(numbers):
            is_over = choice.turn_back(numbers, position) is None
            end = [choice.finish(FinishReason.GUARDRAIL, choice.guarded_end())] if is_over else []
            return [guard.dropped(), *end]
        if guard is not None:
            guard.hold(choice.saved(), position, is_watched=choice.is_controlled)
        chunk = self._grown_by_one(choice, numbers, scores if position == 0 else None)
        return [chunk] if guard is None else guard.take(chunk)

    def _grown_by_one(
        self, choice: Choice, numbers: list[float] | None, scores: tuple[TokenLogprob | None, ...] | None
    ) -> GenerationChunk:
        request, position = choice.request, len(choice.token_ids)
        token_id, num_top = self._token(choice, position), request.sampling.logprobs
        chunk = choice.grow(
            token_id,
            numbers,
            logprob=None if num_top is None else self._logprob(token_id, num_top),
            prompt_logprobs=scores,
        )
        chunk = replace(chunk, num_drawn=_num_drawn(request, choice.index))
        choice.observe_token(chunk.edit, time.monotonic())
        if position == self._fail_after:
            return self._failed(choice, chunk)
        return chunk if chunk.finish_reason is None else choice.finish(chunk.finish_reason, chunk)

    def _failed(self, choice: Choice, chunk: GenerationChunk) -> GenerationChunk:
        return replace(choice.finish(FinishReason.ERROR, chunk), text="", error=GenerationError(_FAILED))

    async def _prompt_end(self, choice: Choice, chunk: GenerationChunk) -> GenerationChunk:
        if choice.request.scoring is not None:
            await asyncio.sleep(self._token_delay_s)
        if not self._is_running:
            return choice.finish(FinishReason.ABORT, chunk)
        if self._fail_after == 0:
            return self._failed(choice, chunk)
        return choice.finish(FinishReason.LENGTH, replace(chunk, prompt_values=_prompt_values(choice.request)))

    def _token(self, choice: Choice, position: int) -> int:
        request, guard = choice.request, choice.guard
        begin, end = _MARKS
        before, reasoned = "", ""
        if request.opening in (Opening.REASONING, Opening.EITHER):
            before, reasoned = begin if request.opening is Opening.EITHER else "", end
        if position < len(before):
            return ord(before[position])
        at = position - len(before) - (self._reasoning_tokens if reasoned else 0)
        if 0 <= at < len(reasoned):
            return ord(reasoned[at])
        at -= len(reasoned)
        text = request.structure if self._text is None else self._text
        if isinstance(text, str) and at >= 0:
            return ord(text[at]) if at < len(text) else _END
        stream = (request.sampling.seed, choice.index, position, request.prompt_token_ids)
        key = repr(stream if guard is None or not guard.num_retries else (*stream, guard.num_retries)).encode()
        return _LETTERS[hashlib.blake2b(key, digest_size=1).digest()[0] % len(_LETTERS)]

    def _logprob(self, token_id: int, num_top: int = 0) -> TokenLogprob:
        top = tuple(TopLogprob(letter, chr(letter), -2.0) for letter in _LETTERS[:num_top])
        return TokenLogprob(token_id, chr(token_id), -2.0, top)


def _num_drawn(request: GenerationRequest, index: int) -> int:
    """Tokens for each that is kept; its values are all the same, so the first candidates would be."""
    per_choice, rest = divmod(request.num_sequences, request.num_choices)
    return per_choice + rest * (index == 0)


def _prompt_values(request: GenerationRequest) -> PromptValues | None:
    """Numbers from 0 to 1 that depend on the head and on all tokens up to the position; the state has four."""
    scoring, tokens = request.scoring, request.prompt_token_ids
    if scoring is None:
        return None
    by_head: dict[str, tuple[float, ...]] = {}
    for name in scoring.heads:
        digest = hashlib.blake2b(name.encode(), digest_size=4)
        values: list[float] = []
        for token_id in tokens:
            digest.update(bytes([token_id]))
            values.append(int.from_bytes(digest.digest()) / 2**32)
        by_head[name] = tuple(values)
    state = hashlib.blake2b(bytes(tokens), digest_size=4).digest()
    return PromptValues(
        values={name: values[-1] for name, values in by_head.items()},
        token_values=by_head if scoring.per_token else None,
        hidden_state=struct.pack("<4f", *state) if scoring.hidden_state else None,
    )


class _FakeStream:
    def __init__(self, engine: FakeEngine, request: GenerationRequest, chunks: AsyncIterator[GenerationChunk]) -> None:
        self._engine = engine
        self._num_unfinished = request.num_choices
        self._chunks = chunks
        self._is_open = True

    def __aiter__(self) -> _FakeStream:
        return self

    async def __anext__(self) -> GenerationChunk:
        if not self._is_open:
            raise StopAsyncIteration
        try:
            chunk = await anext(self._chunks)
        except StopAsyncIteration:
            await self.aclose()
            raise
        self._num_unfinished -= chunk.finish_reason is not None
        return chunk

    async def aclose(self) -> None:
        if self._is_open:
            self._is_open = False
            self._engine.forget(self._num_unfinished)
