"""From states to logits, in two parts: what is linear in the state, which the edit moves along, and what is not.

Knows nothing of requests or control. Enter at `LMHead`.

Shapes: M rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from server.kernels.linear import Bits, frozen_linear
from value_models.linear import PackedLinear


class LMHead:
    """Logits of post-norm states: `finish(project(h))`.

    `project` is linear (so that the logits of h + s * d are project(h) + s * project(d)) and carries no bias;
    `finish` adds what is not linear in h: a bias, and for some models a soft cap.
    """

    def __init__(self, linear: nn.Linear, config: Any, *, bits: Bits = 16) -> None:
        self._linear = frozen_linear(linear.weight, bits=bits, out_dtype=torch.float32)
        self._bias = None if linear.bias is None else linear.bias.detach().float()
        self._softcap: float | None = getattr(config, "final_logit_softcapping", None)
        # Cohere multiplies its logits, Granite divides them.
        self._scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        self._dtype, self._device = linear.weight.dtype, linear.weight.device

    @property
    def is_linear(self) -> bool:
        return self._softcap is None

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
        if self._softcap is not None:
            residual_MV *= 1 - (logits_MV / self._softcap).square()
        return self._transposed(residual_MV.to(self._dtype)) * self._scale

    @cached_property
    def _transposed(self) -> PackedLinear:
        """The map by W^T, made when rollouts first ask for it; the identity's product is W^T itself."""
        eye_DD = torch.eye(self._linear.in_features, dtype=self._dtype, device=self._device)
        return PackedLinear(self._linear(eye_DD).to(self._dtype))
