"""What a body asks for, held against what the engine has: control, lengths, token ids, and the caps over all of it.

Everything here raises before anything is queued. Knows nothing of streams or response formats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from server.api.schemas import GenerationBody
from server.control.levels import in_values
from server.control.objectives import MAX_HEADS_PER_REQUEST, WeightedSum
from server.control.params import ControlParams, UnderPinned, check_units
from server.control.repair import OnStop, Retry, Stop
from server.control.turns import Turn
from server.engines.base import EngineInfo, check_context, check_heads, check_token_ids
from server.errors import ContextLengthError, InvalidRequestError, UnknownHeadError, UnknownModelError
from server.types import GenerationRequest, Opening, SamplingParams

MAX_SEQUENCES = 256
FRESH_SEED = -1
"""What clients send for a random one, as vLLM takes it."""
MAX_NEW_TOKENS = 2**17
MAX_PROMPT_SCORES = 2**18
MAX_TOLD_SCORES = 2**20
"""Log-probabilities of new tokens in an answer that is kept until its end: some 100 MB of text."""
MAX_SCORED_AT_ONCE = 2**15
"""Tokens of the texts that a search may have a reward score at one go, prompts included: all others wait for it."""
MAX_SCORED_IN_ALL = 2**22
"""Tokens that it may have it score over all blocks."""
_WEIGHTS = "control.objective.weights"
_COMPOSED = frozenset(
    {"objective", "step_size", "steps", "max_kl", "max_shift", "stop_below", "on_stop", "search", "trace"}
)
"""Fields of control that a caller may have beside what is pinned; the others are refused."""


def sampling_params(
    body: GenerationBody, info: EngineInfo, *, max_tokens: int, logprobs: int | None, prompt_logprobs: bool
) -> SamplingParams:
    """The body's sampling, null being the default. Raises InvalidRequestError for ids outside the vocabulary."""
    given = {
        name: value
        for name in ("temperature", "min_p", "ignore_eos", "presence_penalty", "frequency_penalty",
                     "repetition_penalty", "logit_bias")
        if (value := getattr(body, name)) is not None
    }  # fmt: skip
    # The limit of a small top_p is the most likely token, which temperature 0 draws.
    if body.top_p == 0:
        given["temperature"] = 0.0
    elif body.top_p is not None:
        given["top_p"] = body.top_p
    check_token_ids(body.stop_token_ids or (), info.vocab_size, param="stop_token_ids")
    check_token_ids(body.logit_bias or (), info.vocab_size, param="logit_bias")
    return SamplingParams(
        **given,
        max_tokens=max_tokens,
        top_k=max(body.top_k or 0, 0),
        seed=None if body.seed == FRESH_SEED else body.seed,
        stop=tuple(body.stop or ()),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def resolve_control(
    body: GenerationBody, info: EngineInfo, pinned: ControlParams | None, turn: Turn | None = None
) -> ControlParams | None:
    """The body's control, or the default one behind `base@head`, with what the server pins, both at that turn and with
    levels of values in place of rewards.

    Without a turn, which is a completion, what the server pins is as at the first, and a caller's that changes over
    turns is refused. Raises UnknownModelError, UnknownHeadError, InvalidRequestError.
    """
    asked = body.control
    if asked is not None and asked.over_turns is not None and turn is None:
        raise InvalidRequestError(
            "control.over_turns: a completion has no turns; ask for a chat or a response, or leave it out",
            param="control.over_turns",
        )
    pinned = pinned and pinned.at_turn(turn or Turn())
    head = head_of_model(body.model, info)
    if head is not None:
        if asked is not None:
            raise InvalidRequestError(
                f"control: the model id {body.model!r} already chooses an objective; use {info.model_id!r} with "
                "control",
                param="control",
            )
        if pinned is not None and head in pinned.objective.head_names:
            return pinned
        control = with_pinned(ControlParams.for_head(head), pinned, steered_by="model")
        told_by = {head: "model"}
    else:
        check_heads(asked, info.heads)
        asked = asked and in_values(asked, info.calibrations(asked.heads_objective.head_levels), turn)
        control, told_by = with_pinned(asked, pinned), {}
    if control is not None:
        check_units(control, info.num_units(control.head_names), told_by=told_by)
    return control


def head_of_model(model: str, info: EngineInfo) -> str | None:
    """The head behind `base@head`; None for the base. Raises UnknownModelError, UnknownHeadError."""
    # The base's own id may hold an "@", so it is compared whole.
    if model == info.model_id:
        return None
    head = model.removeprefix(f"{info.model_id}@")
    if head in ("", model):
        raise UnknownModelError(model, model_ids(info))
    if head not in info.heads:
        raise UnknownHeadError(head, info.heads, param="model")
    return head


def with_pinned(
    asked: ControlParams | None, pinned: ControlParams | None, *, steered_by: str = _WEIGHTS
) -> ControlParams | None:
    """A caller's control on top of the server's own, which it can neither switch off nor take anything from.

    What is pinned acts first, as if it were alone, and the caller's heads are added as far as `UnderPinned` says. They
    are scaled down, if need be, so that they weigh no more than the pinned ones together (by sum of sizes). Budgets are
    the larger of the two, a bound of either guardrail ends the response, and of what a caller searches for nothing is
    kept that the pinned heads score lower than without the search. What is pinned as `on_stop` holds for both
    guardrails, but only pinned bounds let it draw again. A pinned gate, window and schedule hold for the
    caller's heads too. Whatever else a caller may ask for is refused; so are weights of heads that the pinned control
    names anywhere, since those would move its gate or its guardrail.

    `steered_by` is the field that names the caller's heads. Raises InvalidRequestError for what is refused, and for
    too many heads.
    """
    if asked is None or pinned is None:
        return pinned if asked is None else asked
    theirs, mine = _weights_beside_pinned(asked), pinned.objective
    assert isinstance(mine, WeightedSum), "anything else is refused at the start"
    if both := sorted(theirs.keys() & pinned.named_heads.keys()):
        raise InvalidRequestError(f"{steered_by}: this server pins {', '.join(both)}; leave it out", param=steered_by)
    told_by = asked.named_heads | dict.fromkeys(theirs, steered_by)
    others = [name for name in told_by if name not in pinned.named_heads]
    room = MAX_HEADS_PER_REQUEST - len(pinned.named_heads)
    if len(others) > room:
        field = told_by[others[room]]
        raise InvalidRequestError(
            f"{field}: with the {len(pinned.named_heads)} heads that this server pins, at most {room} others are "
            "allowed",
            param=field,
        )
    on_stop = _on_stop(asked, pinned)
    allowed, total = (sum(map(abs, weights.values())) for weights in (mine.weights, theirs))
    share = allowed / total if total > allowed else 1.0
    weights = {**{name: weight * share for name, weight in theirs.items()}, **mine.weights}
    fields: dict[str, Any] = {
        name: getattr(pinned, name) for name in ControlParams.model_fields if name not in _COMPOSED
    }
    return UnderPinned(
        **fields,
        objective=WeightedSum(weights=weights),
        step_size=asked.step_size,
        steps=asked.steps,
        max_kl=max(asked.max_kl, pinned.max_kl),
        max_shift=max(asked.max_shift, pinned.max_shift),
        stop_below=_highest(asked.stop_below or {}, pinned.stop_below or {}) or None,
        on_stop=on_stop,
        search=asked.search,
        trace=asked.trace,
        pinned=pinned,
    )


def _on_stop(asked: ControlParams, pinned: ControlParams) -> OnStop:
    """The pinned one, or a caller's that only ends responses: to draw again until a caller's head is content would be a
    search by that head. Raises InvalidRequestError."""
    field, is_asked = "control.on_stop", asked.on_stop != Stop()
    if is_asked and pinned.on_stop != Stop():
        raise InvalidRequestError(f"{field}: not allowed here, since this server pins its own", param=field)
    if isinstance(asked.on_stop, Retry):
        raise InvalidRequestError(
            f"{field}: retry is not allowed here, since this server pins heads; stop and replace are", param=field
        )
    if asked.search is not None and pinned.repairs:
        raise InvalidRequestError(
            "control.search: not allowed here, since this server's guardrail holds text back", param="control.search"
        )
    return asked.on_stop if is_asked else pinned.on_stop


def with_replacement(control: ControlParams | None, replacement: str | None) -> ControlParams | None:
    """Control whose guardrail ends with the server's text, if it has one, where the request gives none."""
    on_stop = Stop() if control is None else control.on_stop
    if control is None or replacement is None or isinstance(on_stop, Stop):
        return control
    if on_stop.ends_with is None or on_stop.replacement is not None:
        return control
    return control.model_copy(update={"on_stop": on_stop.model_copy(update={"replacement": replacement})})


def _weights_beside_pinned(asked: ControlParams) -> dict[str, float]:
    """The weights of a caller who asks for nothing that could hold back pinned heads. Raises InvalidRequestError."""
    for name, field in ControlParams.model_fields.items():
        if name not in _COMPOSED and getattr(asked, name) != field.default:
            raise InvalidRequestError(
                f"control.{name}: not allowed here, since this server pins heads", param=f"control.{name}"
            )
    if not isinstance(asked.objective, WeightedSum):
        raise InvalidRequestError(
            "control.objective.type: only weighted_sum is allowed here, since this server pins heads",
            param="control.objective.type",
        )
    return asked.objective.weights


def resolve_phase(control: ControlParams | None, opening: Opening | None, info: EngineInfo) -> ControlParams | None:
    """Control of a response that begins so: without a phase where all of it is answer.

    Raises InvalidRequestError for control of reasoning alone where there can be none.
    """
    if control is None or control.phase == "both" or opening in (Opening.EITHER, Opening.REASONING):
        return control
    if control.phase == "reasoning":
        reason = "this model's chat template marks no reasoning"
        if info.marks_reasoning:
            reason = "the prompt has ended the reasoning" if opening else "only chats are told apart into parts"
        raise InvalidRequestError(
            f"control.phase: {reason}, so that all is answer; leave it out, or ask for answer or both",
            param="control.phase",
        )
    return control.model_copy(update={"phase": "both"})


def _highest(some: dict[str, float], others: dict[str, float]) -> dict[str, float]:
    return some | {name: max(bound, some.get(name, bound)) for name, bound in others.items()}


def model_ids(info: EngineInfo) -> list[str]:
    """The base model, and one id for each head's default objective."""
    return [info.model_id, *(f"{info.model_id}@{name}" for name in info.heads)]


def resolve_best_of(best_of: int | None, num_choices: int, control: ControlParams | None) -> int | None:
    """How many whole responses compete; None where all that are sampled are returned. Raises InvalidRequestError."""
    if best_of is None or best_of == num_choices:
        return None
    problem = None
    if control is None:
        problem = "needs control, whose objective says which are the best; without it, ask for n choices"
    elif control.search is not None:
        problem = "not allowed with control.search, which keeps the best already"
    elif control.repairs:
        problem = "not allowed with a guardrail that repairs or holds text back (control.on_stop)"
    if problem is not None:
        raise InvalidRequestError(f"best_of: {problem}", param="best_of")
    return best_of


def with_rest_of_context(
    asked: GenerationRequest, num_prompt_tokens: int, info: EngineInfo, *, field: str, num_instructed: int = 0
) -> GenerationRequest:
    """With as many new tokens as fit behind the prompt, within what one body may ask for.

    `num_instructed` are its tokens behind an instruction; where they leave no room, the engine's check says so. Raises
    ContextLengthError for a prompt that leaves no room for one.
    """
    if num_prompt_tokens >= info.max_model_len:
        raise ContextLengthError(
            f"This model's maximum context length is {info.max_model_len} tokens. The prompt has {num_prompt_tokens}, "
            "which leaves no room for a new one.",
            param=field,
        )
    most_told = MAX_TOLD_SCORES // (asked.num_sequences * ((asked.sampling.logprobs or 0) + 1))
    most_new = MAX_NEW_TOKENS // asked.num_sequences - (0 if asked.control is None else asked.control.max_redrawn)
    most_here = info.max_model_len - max(num_prompt_tokens, num_instructed)
    most_scored = _most_scored(asked, num_prompt_tokens, most_here)
    max_tokens = max(min(most_here, most_new, most_told, most_scored), 1)
    return replace(asked, sampling=asked.sampling.model_copy(update={"max_tokens": max_tokens}))


def check_size(requests: Sequence[GenerationRequest], info: EngineInfo, *, field: str) -> None:
    """Lengths, and the caps on what one body, with a request for each of its prompts, may ask for in all.

    `field` is the one that says how many new tokens.
    """
    first = requests[0]
    num_sequences, max_tokens = len(requests) * first.num_sequences, first.sampling.max_tokens
    if num_sequences > MAX_SEQUENCES:
        param = first.sequences_param
        times = "n x candidates" if first.search is not None else param
        raise InvalidRequestError(
            f"{param}: {len(requests)} prompts x {times} = {num_sequences} sequences; at most {MAX_SEQUENCES} are "
            "allowed",
            param=param,
        )
    for request in requests:
        check_context(len(request.prompt_token_ids), max_tokens, info.max_model_len, param=field)
    if num_sequences * first.max_drawn > MAX_NEW_TOKENS:
        redrawn = f" and {first.max_redrawn} that control.on_stop may draw again" if first.max_redrawn else ""
        raise InvalidRequestError(
            f"{field}: {num_sequences} sequences x {max_tokens} tokens{redrawn} exceed the {MAX_NEW_TOKENS} new tokens "
            "that one request may ask for",
            param=field,
        )


def _most_scored(asked: GenerationRequest, num_prompt_tokens: int, most: int) -> int:
    """New tokens, `most` at most, whose texts a search may have scored as they grow."""
    if asked.search is None or asked.search.reward is None:
        return most
    most_at_once = MAX_SCORED_AT_ONCE // asked.num_sequences - num_prompt_tokens
    in_all = MAX_SCORED_IN_ALL * asked.search.block_tokens // asked.num_sequences
    # The largest T with T (prompt + T) within that.
    return min(most, most_at_once, (math.isqrt(num_prompt_tokens**2 + 4 * in_all) - num_prompt_tokens) // 2)


def check_search(requests: Sequence[GenerationRequest]) -> None:
    """The caps on what a search has a reward score, block by block, by the thread of the decoding steps. Raises
    InvalidRequestError."""
    search, max_tokens = requests[0].search, requests[0].sampling.max_tokens
    if search is None or search.reward is None:
        return
    at_once = sum(one.num_sequences * (len(one.prompt_token_ids) + max_tokens) for one in requests)
    for num_tokens, most, what in (
        (at_once, MAX_SCORED_AT_ONCE, "scored at a time (choices x candidates x (prompt + max_tokens))"),
        (
            at_once * max_tokens // search.block_tokens,
            MAX_SCORED_IN_ALL,
            "scored in all (that x max_tokens / block_tokens)",
        ),
    ):
        if num_tokens > most:
            raise InvalidRequestError(
                f"control.search.reward: {num_tokens} tokens of text might be {what}; at most {most} are allowed",
                param="control.search.reward",
            )


def check_told(requests: Sequence[GenerationRequest], *, may_stream: bool) -> None:
    """The cap on log-probabilities of new tokens, where they are kept until the end; `may_stream` says whether that
    could be avoided by a stream. Raises InvalidRequestError."""
    sampling, num_choices = requests[0].sampling, len(requests) * requests[0].num_choices
    num_scores = num_choices * sampling.max_tokens * ((sampling.logprobs or 0) + 1)
    if sampling.logprobs is not None and num_scores > MAX_TOLD_SCORES:
        raise InvalidRequestError(
            f"logprobs: this may be {num_scores} log-probabilities (choices x max_tokens x (logprobs + 1)); at most "
            f"{MAX_TOLD_SCORES} are allowed{' without stream: true' if may_stream else ''}",
            param="logprobs",
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
