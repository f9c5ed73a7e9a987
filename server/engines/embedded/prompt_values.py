"""What heads say of a prompt's states, for requests that read a text instead of continuing it.

The states are those of the prompt's own rows, so scoring shares its steps with whatever else runs. Every head is read
as a stack of its own: its value then depends on nothing but the state. Knows nothing of scheduling or models. Enter at
`add_token_values` and `prompt_chunk`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from server.control.registry import HeadRegistry
from server.engines.embedded.reports import Scores
from server.engines.embedded.sequence import Sequence as TokenSequence
from server.types import GenerationChunk, PromptValues, ScoringParams

_log = logging.getLogger(__name__)


def add_token_values(sequence: TokenSequence, hidden_TD: Tensor, registry: HeadRegistry) -> None:
    """Keep the values of the states that have just been computed, if each is asked for; failing, keep none."""
    scoring = sequence.request.scoring
    if scoring is None or not scoring.per_token:
        return
    try:
        sequence.group.token_values += _values(scoring.heads, hidden_TD, registry)
    except Exception:
        # It shows in the end that they are missing; the rest of the step is for others.
        _log.exception("Request %s: its tokens could not be scored", sequence.request.request_id)


def prompt_chunk(sequence: TokenSequence, scores: Scores, registry: HeadRegistry) -> GenerationChunk:
    """The one chunk of a request without new tokens, once its prompt is computed.

    A head whose value is not finite says so in its value. A model whose state is not finite is an error, as it is where
    a token is to be drawn. Raises FloatingPointError for that, RuntimeError when values are missing.
    """
    scoring = sequence.request.scoring
    return GenerationChunk(
        index=sequence.index,
        prompt_logprobs=scores.take_prompt(sequence),
        prompt_values=None if scoring is None else _prompt_values(scoring, sequence, registry),
    )


def _prompt_values(scoring: ScoringParams, sequence: TokenSequence, registry: HeadRegistry) -> PromptValues:
    hidden_D, by_token = sequence.group.last_hidden_D, sequence.group.token_values
    assert hidden_D is not None
    if not bool(hidden_D.isfinite().all()):
        raise FloatingPointError("the model's state is not finite")
    if scoring.per_token and len(by_token) != sequence.prompt_len:
        raise RuntimeError(f"{len(by_token)} of {sequence.prompt_len} tokens were scored")
    last = by_token[-1] if scoring.per_token else _values(scoring.heads, hidden_D[None], registry)[0]
    return PromptValues(
        values=dict(zip(scoring.heads, last, strict=True)),
        token_values=dict(zip(scoring.heads, zip(*by_token, strict=True), strict=True)) if scoring.per_token else None,
        hidden_state=hidden_D.float().cpu().numpy().astype("<f4").tobytes() if scoring.hidden_state else None,
    )


def _values(names: Sequence[str], hidden_TD: Tensor, registry: HeadRegistry) -> list[list[float]]:
    """Of each state, each head's value in reward units."""
    if not names:
        return [[] for _ in hidden_TD]
    hidden_TD = hidden_TD.float()
    columns_T1: list[Tensor] = []
    for name in names:
        stack = registry.stack((name,))
        columns_T1.append(stack.rewards(stack.readout(stack.inputs(hidden_TD))[0]))
    return torch.cat(columns_T1, dim=1).tolist()
