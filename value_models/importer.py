"""Reading what others made: the RE-Control paper's value functions, and static steering vectors.

A value function is a PyTorch state dict of two or three linear layers with ReLU. `torch.load` runs with weights_only,
so a pickle with code is refused; it is called from the command line alone, never from a request. A steering vector
(repeng's, llama.cpp's, or a difference of class means of one's own) comes as GGUF or safetensors. Enter at `import_pth`
and `import_vector`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from gguf import GGUFReader
from safetensors.torch import load
from torch import Tensor

from value_models.errors import ImportFileError
from value_models.heads import LinearHead, MLPHead
from value_models.linalg import vector_norm

# In a control vector of repeng or llama.cpp, "direction." and the layer.
_DIRECTION = "direction."
_MAX_LISTED = 8


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


@dataclass(slots=True, frozen=True)
class ImportedVector:
    """A direction in the state before the LM head, and the name of the tensor that it was."""

    vector_D: Tensor
    tensor: str

    @property
    def hidden_size(self) -> int:
        return self.vector_D.shape[0]

    def head(self, *, scale: float = 1.0) -> LinearHead:
        """A head whose value is a state's projection on the direction, and whose step of length one adds `scale` times
        the vector: weight x step size x steps is the vector's coefficient."""
        return LinearHead(
            mean_D=torch.zeros(self.hidden_size),
            scale_D=torch.ones(self.hidden_size),
            inputs_UD=(self.vector_D / vector_norm(self.vector_D))[None],
            input_bias_U=torch.zeros(1),
            ascent_UD=scale * self.vector_D[None],
        )


def import_vector(path: Path, tensor: str | None = None) -> ImportedVector:
    """Read one vector. Without a name: the only tensor of a safetensors file, a GGUF file's last layer's direction.

    repeng takes the last layer's direction from the state behind the final norm, which is the state that is edited
    here; those of earlier layers point elsewhere. Raises ImportFileError.
    """
    try:
        tensors = _gguf_directions(path) if path.suffix == ".gguf" else load(path.read_bytes())
    except OSError as error:
        raise ImportFileError(f"{path} cannot be read ({error.strerror or error})") from error
    except Exception as error:
        # Arbitrary bytes raise whatever the readers stumble over.
        raise ImportFileError(f"{path} is not a {path.suffix[1:]} file ({type(error).__name__}: {error})") from error
    if tensor is None and path.suffix == ".gguf":
        tensor = max(tensors, key=lambda name: int(name.removeprefix(_DIRECTION)), default=None)
    elif tensor is None and len(tensors) == 1:
        (tensor,) = tensors
    if tensor not in tensors:
        listed = ", ".join(sorted(tensors)[:_MAX_LISTED]) or "none"
        raise ImportFileError(f"{path}: choose a vector with --tensor; there are: {listed}")
    vector_D = tensors[tensor].float().squeeze()
    if vector_D.dim() != 1:
        raise ImportFileError(f"{path}: {tensor} has shape {tuple(tensors[tensor].shape)}; a vector was expected")
    if not bool(vector_D.isfinite().all()) or not bool(vector_D.any()):
        raise ImportFileError(f"{path}: {tensor} is zero or not finite")
    return ImportedVector(vector_D, tensor)


def _gguf_directions(path: Path) -> dict[str, Tensor]:
    return {
        tensor.name: torch.tensor(tensor.data.copy())
        for tensor in GGUFReader(path).tensors
        if tensor.name.startswith(_DIRECTION) and tensor.name.removeprefix(_DIRECTION).isdecimal()
    }


def import_pth(path: Path) -> ImportedLayers:
    """Read two or three layers, whatever their keys' prefix is. Raises ImportFileError."""
    try:
        loaded: object = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ImportFileError(f"{path} cannot be read ({error.strerror or error})") from error
    except Exception as error:
        # Any error may come of arbitrary bytes (KeyError, EOFError, ...), and torch's message advises to run the code.
        raise ImportFileError(
            f"{path} is not a file of plain tensors ({type(error).__name__}); code in a pickle is never run. "
            "Write it with torch.save(model.state_dict(), path)"
        ) from error
    state = _state_dict(loaded)
    if state is None:
        raise ImportFileError(f"{path} holds no state dict of tensors")
    names = [name.removesuffix(".weight") for name in state if name.endswith(".weight")]
    expected = {f"{name}{suffix}" for name in names for suffix in (".weight", ".bias")}
    if set(state) != expected:
        raise ImportFileError(f"{path}: expected weights and biases of linear layers, found {', '.join(state)}")
    weights = [state[f"{name}.weight"].float() for name in names]
    biases = [state[f"{name}.bias"].float() for name in names]
    _check(path, weights, biases)
    return ImportedLayers(weights, biases)


def _state_dict(loaded: object) -> dict[str, Tensor] | None:
    """Tensors by name, also where they are kept below `state_dict`; None where the file holds something else."""
    if not isinstance(loaded, dict):
        return None
    whole = cast("dict[object, object]", loaded)
    inner = whole.get("state_dict")
    state = cast("dict[object, object]", inner) if isinstance(inner, dict) else whole
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()):
        return None
    return cast("dict[str, Tensor]", state)


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
