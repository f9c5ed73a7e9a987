"""A request in vLLM's terms, or why it cannot be one.

What this engine serves is listed by name, so a field that is new here is refused until someone has thought of it.
Knows no vLLM. Enter at `check_served` and `vllm_sampling`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from collections.abc import Collection
from typing import Any

from pydantic import BaseModel

from server.errors import UnsupportedFieldError
from server.types import GenerationRequest

REQUEST_FIELDS = frozenset(
    {"request_id", "prompt_token_ids", "sampling", "control", "num_choices", "cache_salt", "opening", "calls"}
)
SAMPLING_FIELDS = frozenset(
    {
        "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "ignore_eos", "stop", "stop_token_ids",
        "logit_bias", "presence_penalty", "frequency_penalty", "repetition_penalty", "logprobs", "prompt_logprobs",
    }
)  # fmt: skip
CONTROL_FIELDS = frozenset(
    {
        "objective", "step_size", "steps", "max_kl", "max_shift", "max_response_kl", "phase", "gate", "window",
        "schedule", "stop_below", "trace", "in_calls", "pinned",
    }
)  # fmt: skip
OBJECTIVES = frozenset({"weighted_sum", "worst_case", "target", "floor"})
"""Those that need no more than the state behind the token."""


def check_served(request: GenerationRequest) -> None:
    """Raises UnsupportedFieldError, which names the field."""
    if request.control is not None and request.control.objective.type not in OBJECTIVES:
        _refuse("control.objective.type", "an objective that needs more than the state behind a token")
    for field in dataclasses.fields(request):
        if field.name not in REQUEST_FIELDS and getattr(request, field.name) != field.default:
            _refuse(field.name)
    _check_fields(request.sampling, SAMPLING_FIELDS, "")
    if request.control is not None:
        _check_fields(request.control, CONTROL_FIELDS, "control.")
        if request.calls is not None and not request.control.in_calls:
            # Its workers draw tokens before this side reads them.
            _refuse("control.in_calls", "control that leaves calls of tools alone; with true it acts in them too")


def vllm_sampling(request: GenerationRequest, index: int, end_token_ids: Collection[int]) -> dict[str, Any]:
    """Keyword arguments of vLLM's SamplingParams for one choice, but for `extra_args`.

    Text, stop strings and ends of text are this program's own, so that both engines give the same.
    """
    sampling = request.sampling
    has_prompt_logprobs = sampling.prompt_logprobs and index == 0
    return {
        # vLLM generates one at least; whoever asked for none is not given it.
        "max_tokens": max(sampling.max_tokens, 1),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        # Without one, vLLM's own stream is faster than one for each row.
        "seed": None if sampling.seed is None else _choice_seed(sampling.seed, index),
        "ignore_eos": True,
        "stop_token_ids": sorted(end_token_ids),
        "logit_bias": sampling.logit_bias or None,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "logprobs": sampling.logprobs,
        "prompt_logprobs": (sampling.logprobs or 0) if has_prompt_logprobs else None,
        "detokenize": False,
    }


def _check_fields(model: BaseModel, served: Collection[str], prefix: str) -> None:
    for name, field in type(model).model_fields.items():
        if name not in served and getattr(model, name) != field.get_default(call_default_factory=True):
            _refuse(f"{prefix}{name}")


def _refuse(field: str, what: str = "") -> None:
    raise UnsupportedFieldError(f"{field}: the vLLM engine does not serve {what or 'this'}", param=field)


def _choice_seed(seed: int, index: int) -> int:
    """One for each choice, of 63 bits."""
    digest = hashlib.blake2b(struct.pack("<qq", seed, index), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
