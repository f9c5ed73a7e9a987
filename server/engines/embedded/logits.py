"""What a request does to its rows' logits before a token is drawn: a bias for tokens, and penalties for repetition.

The order is vLLM's: bias, then repetition (over prompt and output), frequency and presence (over output alone). All of
it comes after control, and log-probabilities are reported from the logits before it: they are those after control, at
temperature 1, before penalties and sampling filters. Only the tokens concerned are touched, so a row without rules, or
whose rules do nothing yet, keeps its logits to the bit. Knows nothing of models or scheduling. Enter at `adjusted`.

Source: Keskar et al. 2019 (repetition); OpenAI's API reference (frequency, presence, bias).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.types import SamplingParams


@dataclass(slots=True, frozen=True)
class LogitRules:
    """One request's rules, made once. `prompt_token_ids` holds each token of the prompt once, for repetition alone."""

    bias_token_ids: tuple[int, ...]
    bias: tuple[float, ...]
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    prompt_token_ids: frozenset[int]

    @classmethod
    def of(cls, sampling: SamplingParams, prompt_token_ids: Sequence[int]) -> LogitRules | None:
        """None when the request asks for nothing that changes logits."""
        repeats = sampling.repetition_penalty != 1.0
        if not (sampling.logit_bias or sampling.presence_penalty or sampling.frequency_penalty or repeats):
            return None
        return cls(
            bias_token_ids=tuple(sampling.logit_bias),
            bias=tuple(sampling.logit_bias.values()),
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            prompt_token_ids=frozenset(prompt_token_ids) if repeats else frozenset(),
        )

    def apply(self, logits_V: Tensor, output_token_ids: Sequence[int]) -> Tensor:
        """New logits [V] of the row whose output so far is given; the ones passed in stay as they are."""
        device, out_V = logits_V.device, logits_V.clone()
        if self.bias_token_ids:
            out_V[torch.tensor(self.bias_token_ids, device=device)] += out_V.new_tensor(self.bias)
        if self.repetition_penalty != 1.0:
            seen_M = torch.tensor(sorted(self.prompt_token_ids.union(output_token_ids)), device=device)
            values_M = out_V[seen_M]
            factor_M = torch.where(values_M > 0, 1.0 / self.repetition_penalty, self.repetition_penalty)
            out_V[seen_M] = values_M * factor_M
        if output_token_ids and (self.frequency_penalty or self.presence_penalty):
            used_M, counts_M = torch.tensor(output_token_ids, device=device).unique(return_counts=True)
            out_V[used_M] -= self.frequency_penalty * counts_M + self.presence_penalty
        return out_V


def adjusted(logits_BV: Tensor, rules: Sequence[LogitRules | None], outputs: Sequence[Sequence[int]]) -> Tensor:
    """Logits [B, V] to draw from. Where no row has rules these are the ones passed in, which are never changed."""
    if not any(rules):
        return logits_BV
    out_BV = logits_BV.clone()
    for i, (rule, output) in enumerate(zip(rules, outputs, strict=True)):
        if rule is not None:
            out_BV[i] = rule.apply(logits_BV[i], output)
    return out_BV
