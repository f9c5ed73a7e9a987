"""The editor's view of whatever vLLM computes logits with: quantised, sharded over processes, scaled or capped.

`compute_logits` of the loaded model is called as it is, so a row that is not controlled gets the logits that vLLM would
have given it, to the bit. What the editor needs to know, that logits are linear in the state but for a bias and a soft
cap, is tried out once, on every rank alike. Knows nothing of requests. Enter at `VllmUnembedding.of`.

Shapes: M rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from server.errors import ModelLoadError

ComputeLogits = Callable[[Tensor], Tensor | None]
# Rounding of bfloat16 logits, relative to the largest.
_TOLERANCE = 2.0**-6


class VllmUnembedding:
    """Logits of states: finish(project(h)), as `server.control.editor.Unembedding` wants it."""

    def __init__(
        self, compute_logits: ComputeLogits, dtype: torch.dtype, *, processor: Any | None, bias_V: Tensor | None
    ) -> None:
        self._compute_logits = compute_logits
        self._dtype = dtype
        self._processor = processor
        self._bias_V = bias_V
        self.num_rows = 0
        """Of the step: they are computed apart from shifts that come behind them, as if there were no control."""

    @classmethod
    def of(
        cls, compute_logits: ComputeLogits, model: torch.nn.Module, hidden_size: int, dtype: torch.dtype, device: Any
    ) -> VllmUnembedding:
        """Raises ModelLoadError when the logits are not what the editor can move."""
        processors = [module for module in model.modules() if getattr(module, "soft_cap", None) is not None]
        if len(processors) > 1:
            raise ModelLoadError("The model caps its logits in more than one place, so control cannot move them.")
        unembedding = cls(compute_logits, dtype, processor=processors[0] if processors else None, bias_V=None)
        probe_MD = torch.linspace(-1.0, 1.0, 2 * hidden_size, device=device).view(2, hidden_size)
        bias_V = unembedding.project(torch.zeros_like(probe_MD))[0].float()
        if bias_V.any():
            unembedding._bias_V = bias_V
        once_MV, twice_MV = (unembedding.project(scale * probe_MD).float() for scale in (1, 2))
        if not (twice_MV - 2 * once_MV).abs().amax() <= _TOLERANCE * twice_MV.abs().amax():
            raise ModelLoadError("The model's logits are not linear in its last state, so control cannot move them.")
        return unembedding

    @property
    def is_linear(self) -> bool:
        return self._processor is None

    @property
    def soft_cap(self) -> tuple[float, float] | None:
        if self._processor is None or self._bias_V is not None:
            return None
        return self._processor.soft_cap, self._processor.soft_cap * self._processor.scale

    @property
    def is_exact(self) -> bool:
        """Whether finish(project(h)) is what vLLM computes, to the bit."""
        return self._processor is None and self._bias_V is None

    def project(self, hidden_MD: Tensor) -> Tensor:
        """[M, D] any float dtype -> [M, V] in memory of its own, in float32 or as `Unembedding.project` allows."""
        num_rows = min(self.num_rows, len(hidden_MD))
        parts = hidden_MD.to(self._dtype).split([num_rows, len(hidden_MD) - num_rows])
        with self._uncapped():
            computed = [self._computed(part) for part in parts if len(part)]
        if not self.is_exact or computed[0].dtype != torch.bfloat16:
            computed = [part.float() for part in computed]
        projected_MV = torch.cat(computed) if len(computed) > 1 else computed[0]
        return projected_MV if self._bias_V is None else projected_MV - self._bias_V

    def finish(self, projected_MV: Tensor) -> Tensor:
        """[M, V] float32 -> logits [M, V] float32."""
        if self._bias_V is not None:
            projected_MV = projected_MV + self._bias_V
        if self._processor is not None:
            cap = self._processor.soft_cap
            projected_MV = torch.tanh(projected_MV / cap) * cap * self._processor.scale
        return projected_MV

    def plain(self, hidden_MD: Tensor) -> Tensor:
        """What vLLM computes, as the float32 that its sampler makes of it."""
        return self._computed(hidden_MD).float()

    def _computed(self, hidden_MD: Tensor) -> Tensor:
        logits_MV = self._compute_logits(hidden_MD)
        assert logits_MV is not None, "this rank computes no logits"
        return logits_MV.contiguous()

    @contextlib.contextmanager
    def _uncapped(self) -> Iterator[None]:
        if self._processor is None:
            yield
            return
        cap, scale = self._processor.soft_cap, self._processor.scale
        self._processor.soft_cap, self._processor.scale = None, 1.0
        try:
            yield
        finally:
            self._processor.soft_cap, self._processor.scale = cap, scale
