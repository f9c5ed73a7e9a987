"""Files that are no value function of the paper, and the paper's own key names."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from value_models.importer import ImportFileError, import_pth


def layer(name: str, size_in: int, size_out: int) -> dict[str, torch.Tensor]:
    weight = torch.arange(size_in * size_out, dtype=torch.float32).reshape(size_out, size_in)
    return {f"{name}.weight": weight, f"{name}.bias": torch.zeros(size_out)}


def test_a_file_with_the_published_names_and_dtype_is_read_in_float32(tmp_path: Path) -> None:
    state = {**layer("fc1", 6, 4), **layer("fc2", 4, 4), **layer("fc3", 4, 1)}
    torch.save({name: tensor.bfloat16() for name, tensor in state.items()}, tmp_path / "value.pth")
    imported = import_pth(tmp_path / "value.pth")
    assert imported.hidden_size == 6
    assert [tuple(weight.shape) for weight in imported.weights] == [(4, 6), (4, 4), (1, 4)]
    assert torch.equal(imported.weights[0], state["fc1.weight"])
    assert imported.weights[0].dtype == torch.float32


@pytest.mark.parametrize("content", [b"", b"hello world", b"PK\x03\x04" + b"0" * 40, pickle.dumps(1), b"\x00" * 64])
def test_arbitrary_bytes_are_one_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "value.pth").write_bytes(content)
    with pytest.raises(ImportFileError, match="not a file of plain tensors"):
        import_pth(tmp_path / "value.pth")


class Evil:
    def __reduce__(self) -> Any:
        return (open, ("/nonexistent/recontrol", "w"))


def test_a_refused_pickle_is_not_answered_with_advice_to_run_its_code(tmp_path: Path) -> None:
    torch.save({"a.weight": Evil()}, tmp_path / "value.pth")
    with pytest.raises(ImportFileError, match="never run") as refusal:
        import_pth(tmp_path / "value.pth")
    assert "weights_only" not in str(refusal.value)


def test_a_file_that_is_not_there_is_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(ImportFileError, match="No such file"):
        import_pth(tmp_path / "value.pth")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({0: torch.zeros(1)}, "no state dict"),
        ({**layer("a", 3, 4), **layer("b", 4, 2)}, "single value"),
        ({**layer("a", 3, 4), "b.weight": torch.full((1, 4), float("nan")), "b.bias": torch.zeros(1)}, "not finite"),
        ({**layer("a", 3, 3), **layer("b", 3, 3), **layer("c", 3, 3), **layer("d", 3, 1)}, "4 layers"),
    ],
)
def test_layers_that_are_no_value_function_are_refused(tmp_path: Path, content: Any, what: str) -> None:
    torch.save(content, tmp_path / "value.pth")
    with pytest.raises(ImportFileError, match=what):
        import_pth(tmp_path / "value.pth")
