"""What all routes that generate share: a body becomes GenerationRequests, which are queued as one `Generation`.

Every check happens before anything is queued (`resolution.py`). Knows nothing of response formats. Enter at `start`, or
at `queue` with requests that do not come from a body of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from fastapi import Request

from server.api.gate.context import context_of
from server.api.messages import ChatMessage
from server.api.pinned import check_beside_pinned
from server.api.resolution import (
    check_scored,
    check_search,
    check_size,
    check_told,
    resolve_best_of,
    resolve_control,
    resolve_phase,
    sampling_params,
    with_replacement,
    with_rest_of_context,
)
from server.api.running import Generation, close_all
from server.api.schemas import GenerationBody
from server.api.structure import structure_of, wanted_structure
from server.api.tools import ToolPlan
from server.api.workers import Workers
from server.control.levels import UNCALIBRATED, uncalibrated
from server.control.turns import Turn
from server.engines.base import ChunkStream, Engine, EngineInfo
from server.errors import ShuttingDownError
from server.types import ChatRendering, GenerationRequest, Opening

LEAST_NEW_TOKENS = 16
"""Of a text whose length the caller left open; with fewer in the minute's rest there is a 429 and no useless text."""
_Result = TypeVar("_Result")


async def tokenized(request: Request, read: Callable[[], _Result]) -> _Result:
    """What `read` makes of a body's texts, off the event loop.

    The caller pays before it is done, once for a body. That is part of what `queue` then charges for the tokens; where
    nothing is queued in the end, the reading was done all the same. Raises RateLimitError, OverloadedError, and what
    `read` raises.
    """
    workers: Workers = request.app.state.workers
    context = context_of(request)
    if context.caller is not None and context.reading is None:
        context.reading = await context.caller.pay_reading(context.num_body_bytes)
    return await workers.run(read, size=context.num_body_bytes)


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
    check_search(requests)
    if not body.stream or body.is_kept_whole:
        check_told(requests, may_stream=not body.is_kept_whole)
    if prompt_logprobs:
        check_scored(prompts, num_choices, logprobs or 0)
    user = body.safety_identifier if body.user is None else body.user
    context_of(request).facts |= {"model": body.model, "prompts": len(prompts), "n": num_choices, "user": user}
    generation = await queue(
        request, requests, timeout_s=body.timeout_s, size_field=body.size_field, takes_less=max_tokens is None
    )
    generation.hides_reasoning = hides_reasoning
    generation.structure_field = wanted_structure(body.structures)[0] if held is None else "tools"
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
        num_tokens, reading = _num_tokens(requests, max_tokens), context.reading
        charge = await context.caller.pay(num_tokens, least=least, field=size_field, paid=reading)
        requests = _within(requests, charge.tokens)
    streams: list[ChunkStream] = []
    try:
        for generation_request in requests:
            streams.append(engine.generate(generation_request))
    except BaseException:
        await close_all(streams)
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
