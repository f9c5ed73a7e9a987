"""What every engine refuses before it queues anything. Knows no model, only its sizes. Enter at `check_request`."""

from __future__ import annotations

from collections.abc import Collection

from server.control.objectives import Instruction
from server.engines.base import check_context, check_heads, check_token_ids
from server.errors import ContextLengthError, InvalidRequestError
from server.types import GenerationRequest


def check_is_text(request: GenerationRequest, placeholder_ids: Collection[int]) -> None:
    """Raises InvalidRequestError for a token that stands for a picture or a sound, whose states are not its own."""
    for token_id in placeholder_ids:
        if token_id in request.prompt_token_ids:
            raise InvalidRequestError(
                f"prompt: token id {token_id} stands for what is no text, which is not served", param="prompt"
            )


def check_request(
    request: GenerationRequest,
    *,
    heads: Collection[str],
    vocab_size: int,
    max_model_len: int,
    rewards: Collection[str] = (),
) -> None:
    """Raises UnknownHeadError, InvalidRequestError or ContextLengthError for what could not be run.

    `rewards` are the names of those that are registered for searches.
    """
    if request.control is not None and request.control.over_turns is not None:
        raise InvalidRequestError(
            "control.over_turns: only a chat that the server answers has turns; give bounds that stay",
            param="control.over_turns",
        )
    check_heads(request, heads)
    _check_reward(request, rewards)
    _check_instruction(request, vocab_size=vocab_size, max_model_len=max_model_len)
    if request.scoring is not None:
        assert (request.num_choices, request.sampling.max_tokens, request.control) == (1, 0, None)
    if request.control is not None and request.control.repairs:
        assert (request.search, request.best_of) == (None, None)
    prompt, sampling = request.prompt_token_ids, request.sampling
    if not prompt:
        raise InvalidRequestError("prompt: must hold at least one token", param="prompt")
    for field in ("prompt", "stop_token_ids", "logit_bias"):
        check_token_ids(prompt if field == "prompt" else getattr(sampling, field), vocab_size, param=field)
    if request.structure is not None and sampling.ignore_eos:
        raise InvalidRequestError(
            "ignore_eos: not allowed with structured output, which says where the text ends", param="ignore_eos"
        )
    check_context(len(prompt), sampling.max_tokens, max_model_len)


def _check_instruction(request: GenerationRequest, *, vocab_size: int, max_model_len: int) -> None:
    """Of control that follows one. Raises InvalidRequestError or ContextLengthError."""
    instructed = request.instructed_token_ids
    has_instruction = request.control is not None and request.control.instruction is not None
    assert has_instruction == bool(instructed), "the prompt behind the instruction goes with control that follows it"
    if request.control is not None and isinstance(request.control.objective, Instruction):
        _check_compares_nothing(request)
    if not instructed:
        return
    param = "control.objective.text"
    check_token_ids(instructed, vocab_size, param=param)
    if len(instructed) + request.sampling.max_tokens > max_model_len:
        raise ContextLengthError(
            f"{param}: behind this instruction the prompt has {len(instructed)} tokens (without it "
            f"{len(request.prompt_token_ids)}), and {request.sampling.max_tokens} new ones are asked for; together "
            f"they must not exceed this model's maximum context length of {max_model_len} tokens",
            param=param,
        )


def _check_reward(request: GenerationRequest, rewards: Collection[str]) -> None:
    """Whether what a search is to go by is there. Raises InvalidRequestError."""
    param, reward = "control.search.reward", None if request.search is None else request.search.reward
    if reward is not None and reward not in rewards:
        known = f"registered are {', '.join(sorted(rewards))}" if rewards else "none is registered (--search-rewards)"
        raise InvalidRequestError(f"{param}: this server has no reward {reward!r}; {known}", param=param)


def _check_compares_nothing(request: GenerationRequest) -> None:
    """An instruction gives no score by which texts could be compared. Raises InvalidRequestError."""
    param = "best_of" if request.best_of is not None else "control.search"
    if request.best_of is not None or request.search is not None:
        raise InvalidRequestError(
            f"{param}: not allowed with an objective of type instruction, which gives texts no score", param=param
        )
