"""From states to logits, in two parts: what is linear in the state, which the edit moves along, and what is not.

Knows nothing of requests or control. Enter at `LMHead`.

Shapes: M rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from server.kernels.linear import Bits, FrozenLinear, frozen_linear

_SAME = 1e-3
"""Relative; a fit over a text is far nearer."""
_NEARLY_ONE = 1 - 1e-6


class LMHead:
    """Logits of post-norm states: `finish(project(h))`.

    `project` is linear (so that the logits of h + s * d are project(h) + s * project(d)) and carries no bias;
    `finish` adds what is not linear in h: a bias, and for some models a soft cap.
    """

    def __init__(self, linear: nn.Linear, *, scale: float = 1.0, softcap: float | None = None, bits: Bits = 16) -> None:
        """Logits z = scale x (W h + b); with a soft cap, softcap x tanh(z / softcap)."""
        self._linear = frozen_linear(linear.weight, bits=bits, out_dtype=torch.float32)
        self._bias = None if linear.bias is None else linear.bias.detach().float() * scale
        self._softcap, self._scale = softcap, scale
        self._dtype, self._device = linear.weight.dtype, linear.weight.device

    @classmethod
    def like(cls, linear: nn.Linear, config: Any, states_MD: Tensor, logits_MV: Tensor) -> LMHead:
        """One that gives these logits of these states, as near as a scale and a soft cap come to it.

        The scale is fitted, since models name and apply it in many ways: Cohere multiplies, Granite divides, MiniCPM
        divides the states. It is one that the configuration holds, or the inverse of one, if that is as good.
        """
        raw = cls(linear)
        raw_MV = raw.logits(states_MD)
        caps = [None, *(value for name, value in _numbers(config).items() if "cap" in name and value > 0)]
        heads = [raw._scaled(_scale(raw_MV, _uncapped(logits_MV, cap), config), cap) for cap in caps]
        if len(heads) == 1:
            return heads[0]
        return min(heads, key=lambda head: float((head.logits(states_MD) - logits_MV).norm()))

    def _scaled(self, scale: float, softcap: float | None) -> LMHead:
        """The same map with another scale and cap, where this one has neither."""
        head = copy.copy(self)
        head._bias = None if self._bias is None else self._bias * scale
        head._softcap, head._scale = softcap, scale
        return head

    def quantized(self, linear: nn.Linear, bits: Bits) -> LMHead:
        return LMHead(linear, scale=self._scale, softcap=self._softcap, bits=bits)

    @property
    def is_linear(self) -> bool:
        return self._softcap is None

    @property
    def soft_cap(self) -> tuple[float, float] | None:
        return None if self._softcap is None or self._bias is not None else (self._softcap, self._softcap)

    def project(self, hidden_MD: Tensor) -> Tensor:
        """[M, D] any float dtype -> [M, V] float32."""
        logits_MV = self._linear(hidden_MD.to(self._dtype)).float()
        return logits_MV if self._scale == 1.0 else logits_MV * self._scale

    def finish(self, projected_MV: Tensor) -> Tensor:
        """[M, V] float32 -> logits [M, V] float32."""
        if self._bias is not None:
            projected_MV = projected_MV + self._bias
        if self._softcap is not None:
            projected_MV = self._softcap * torch.tanh(projected_MV / self._softcap)
        return projected_MV

    def logits(self, hidden_MD: Tensor) -> Tensor:
        """[M, D] any float dtype -> logits [M, V] float32."""
        return self.finish(self.project(hidden_MD))

    def logp_grads(self, hidden_MD: Tensor, token_ids_M: Tensor) -> Tensor:
        """Gradients [M, D] of tokens' log-probabilities (temperature 1) by the states, in closed form.

        For plain logits W h it is W[token] - E[W[v]], v ~ softmax(W h): the token's row less the expected row.
        """
        logits_MV = self.logits(hidden_MD)
        residual_MV = logits_MV.softmax(dim=-1).neg_()
        residual_MV.scatter_add_(1, token_ids_M[:, None], torch.ones_like(residual_MV[:, :1]))
        if (slopes_MV := self.slopes(logits_MV)) is not None:
            residual_MV *= slopes_MV
        return self._transposed(residual_MV.to(self._dtype)) * self._scale

    def rows(self) -> Tensor:
        """The linear part as a matrix W [V, D] float32: project(h) is W h."""
        return self.project(torch.eye(self._linear.in_features, dtype=self._dtype, device=self._device)).T

    def slopes(self, logits_MV: Tensor) -> Tensor | None:
        """What `finish` multiplies small changes of the projected by, at its results; None where that is 1."""
        return None if self._softcap is None else 1 - (logits_MV / self._softcap).square()

    @cached_property
    def _transposed(self) -> FrozenLinear:
        """The map by W^T, made when rollouts first ask for it; the identity's product is W^T itself."""
        eye_DD = torch.eye(self._linear.in_features, dtype=self._dtype, device=self._device)
        return frozen_linear(self._linear(eye_DD).to(self._dtype))


def _scale(raw_MV: Tensor, logits_MV: Tensor, config: Any) -> float:
    """By least squares."""
    fitted = float((raw_MV * logits_MV).sum() / raw_MV.square().sum())
    numbers = [value for value in _numbers(config).values() if value]
    known = [1.0, *numbers, *(1 / value for value in numbers)]
    return next((value for value in known if abs(value - fitted) <= _SAME * abs(fitted)), fitted)


def _uncapped(logits_MV: Tensor, softcap: float | None) -> Tensor:
    if softcap is None:
        return logits_MV
    return softcap * torch.atanh((logits_MV / softcap).clamp(-_NEARLY_ONE, _NEARLY_ONE))


def _numbers(config: Any) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in vars(config).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
