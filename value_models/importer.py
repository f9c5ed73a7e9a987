"""Reading the RE-Control paper's value functions: a PyTorch state dict of two or three linear layers with ReLU.

`torch.load` runs with weights_only, so a pickle with code is refused; it is called from the command line alone, never
from a request. Enter at `import_pth`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from value_models.heads import MLPHead


class ImportFileError(ValueError):
    """The file is not a value function of the paper's kind; the message says what was found."""


@dataclass(slots=True, frozen=True)
class ImportedLayers:
    """Linear layers in order: weights [out, in], biases [out]; the last has one output."""

    weights: list[Tensor]
    biases: list[Tensor]

    @property
    def hidden_size(self) -> int:
        return self.weights[0].shape[1]

    def head(self) -> MLPHead:
        """The same function as a head, without normalisation and with the plain gradient as its way uphill."""
        size = self.hidden_size
        return MLPHead(
            mean_D=torch.zeros(size),
            scale_D=torch.ones(size),
            # The paper's network has no linear part beside it.
            inputs_UD=torch.cat([torch.zeros(1, size), self.weights[0]]),
            input_bias_U=torch.cat([torch.zeros(1), self.biases[0]]),
            hidden_weights=self.weights[1:-1],
            hidden_biases=self.biases[1:-1],
            out_weight_H=self.weights[-1][0],
            out_bias=self.biases[-1],
        )


def import_pth(path: Path) -> ImportedLayers:
    """Read two or three layers, whatever their keys' prefix is. Raises ImportFileError."""
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ImportFileError(f"{path} cannot be read ({error.strerror or error})") from error
    except Exception as error:
        # Any error may come of arbitrary bytes (KeyError, EOFError, ...), and torch's message advises to run the code.
        raise ImportFileError(
            f"{path} is not a file of plain tensors ({type(error).__name__}); code in a pickle is never run. "
            "Write it with torch.save(model.state_dict(), path)"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise ImportFileError(f"{path} holds no state dict of tensors")
    names = [name.removesuffix(".weight") for name in state if name.endswith(".weight")]
    expected = {f"{name}{suffix}" for name in names for suffix in (".weight", ".bias")}
    if set(state) != expected:
        raise ImportFileError(f"{path}: expected weights and biases of linear layers, found {', '.join(state)}")
    weights = [state[f"{name}.weight"].float() for name in names]
    biases = [state[f"{name}.bias"].float() for name in names]
    _check(path, weights, biases)
    return ImportedLayers(weights, biases)


def _check(path: Path, weights: list[Tensor], biases: list[Tensor]) -> None:
    shapes = ", ".join(str(tuple(weight.shape)) for weight in weights)
    if len(weights) not in (2, 3):
        raise ImportFileError(f"{path} has {len(weights)} layers ({shapes}); the paper's heads have 2 or 3")
    chains = all(
        weight.dim() == 2 and bias.shape == weight.shape[:1] for weight, bias in zip(weights, biases, strict=True)
    ) and all(after.shape[1] == before.shape[0] for before, after in itertools.pairwise(weights))
    if not chains or weights[-1].shape[0] != 1:
        raise ImportFileError(f"{path}: layers of shapes {shapes} do not chain to a single value")
    if not all(bool(tensor.isfinite().all()) for tensor in (*weights, *biases)):
        raise ImportFileError(f"{path} holds numbers that are not finite")
