"""The linear maps of a model's modules replaced by ones that give a row the same bits in every batch.

Knows nothing of how a model is run. Enter at `pack`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from server.engines.embedded.model.experts import expert_weights, is_experts, pack_experts
from server.errors import ConfigurationError
from server.kernels.linear import Bits, can_run_natively, frozen_linear


def pack(model: nn.Module, bits: Bits, *, but: Collection[nn.Module] = ()) -> None:
    """Replace every linear layer below `model` in place but for some, and the experts' maps."""
    pack_experts(model, bits)
    _pack_linears(model, bits, but)


@contextmanager
def weights_read(model: nn.Module) -> Iterator[set[nn.Module]]:
    """Collects the linear layers whose weight others read while the model runs, and which therefore must keep it."""
    read: set[nn.Module] = set()

    class Watched(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return functional.linear(input, self._parameters["weight"], self._parameters["bias"])

        def __getattr__(self, name: str) -> Any:
            if name == "weight":
                read.add(self)
            return super().__getattr__(name)

    linears = [module for module in model.modules() if type(module) is nn.Linear]
    for linear in linears:
        linear.__class__ = Watched
    try:
        yield read
    finally:
        for linear in linears:
            linear.__class__ = nn.Linear


def check_quantizable(backbone: nn.Module, lm_head: nn.Linear, bits: Bits) -> None:
    """Raises ConfigurationError, which names the first map that cannot have so few bits here."""
    for name, weight in [*_weights(backbone), ("lm_head", lm_head.weight)]:
        if not can_run_natively(weight, bits=bits):
            raise ConfigurationError(
                f"quantization: {name} [{weight.shape[0]}, {weight.shape[1]}] in {weight.dtype} cannot be quantized "
                "here; that takes the native kernels (a CPU with AVX-512 and bfloat16), dtype bfloat16, and inputs in "
                "multiples of 32"
            )


def _weights(backbone: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every matrix [out, in], of experts one for all of a module, by name."""
    for name, module in backbone.named_modules():
        weight = _weight_of(module)
        if weight is not None:
            yield name, weight
        elif is_experts(module):
            for part, stacked in expert_weights(module).items():
                yield f"{name}.{part}", stacked[0]


def _weight_of(module: nn.Module) -> Tensor | None:
    """The weight [out, in] of a linear map; None for any other module."""
    # Some routers are linear layers that do more than that.
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return module.weight
    return module.weight.t() if isinstance(module, Conv1D) else None


def _pack_linears(model: nn.Module, bits: Bits, but: Collection[nn.Module]) -> None:
    """Weights shared with an embedding stay there unpacked."""
    for name, child in list(model.named_children()):
        weight: Any = _weight_of(child)
        if weight is None:
            _pack_linears(child, bits, but)
        elif child not in but:
            bias: Any = child.bias
            setattr(model, name, frozen_linear(weight, bias, bits=bits))
