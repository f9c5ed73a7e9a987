"""What every engine refuses before it queues anything. Knows no model, only its sizes. Enter at `check_request`."""

from __future__ import annotations

from collections.abc import Collection

from server.engines.base import check_context, check_heads, check_token_ids
from server.errors import InvalidRequestError
from server.types import GenerationRequest


def check_is_text(request: GenerationRequest, placeholder_ids: Collection[int]) -> None:
    """Raises InvalidRequestError for a token that stands for a picture or a sound, whose states are not its own."""
    for token_id in placeholder_ids:
        if token_id in request.prompt_token_ids:
            raise InvalidRequestError(
                f"prompt: token id {token_id} stands for what is no text, which is not served", param="prompt"
            )


def check_request(request: GenerationRequest, *, heads: Collection[str], vocab_size: int, max_model_len: int) -> None:
    """Raises UnknownHeadError, InvalidRequestError or ContextLengthError for what could not be run."""
    if request.control is not None and request.control.over_turns is not None:
        raise InvalidRequestError(
            "control.over_turns: only a chat that the server answers has turns; give bounds that stay",
            param="control.over_turns",
        )
    check_heads(request, heads)
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
