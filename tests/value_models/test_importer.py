"""Files that are no value function of the paper, and the paper's own key names."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import save_file

from value_models.errors import ImportFileError
from value_models.importer import import_pth, import_vector


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


def test_layers_inside_a_training_checkpoint_are_found(tmp_path: Path) -> None:
    layers = {**layer("a", 3, 4), **layer("b", 4, 1)}
    torch.save(layers, tmp_path / "plain.pth")
    torch.save({"state_dict": layers}, tmp_path / "checkpoint.pth")
    hidden = torch.randn(5, 3)
    plain, checkpoint = (import_pth(tmp_path / f"{name}.pth") for name in ("plain", "checkpoint"))
    assert torch.equal(plain.head().value(hidden), checkpoint.head().value(hidden))


def repeng_file(path: Path, directions: dict[str, torch.Tensor]) -> Path:
    """As repeng's export writes it."""
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(directions))
    for name, vector in directions.items():
        writer.add_tensor(name, vector.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_last_layers_direction_of_a_repeng_file_is_taken_unless_another_is_named(tmp_path: Path) -> None:
    vectors = {f"direction.{layer}": torch.randn(6) for layer in (2, 10, 9)}
    path = repeng_file(tmp_path / "happy.gguf", vectors)
    assert torch.equal(import_vector(path).vector_D, vectors["direction.10"])
    assert torch.equal(import_vector(path, "direction.2").vector_D, vectors["direction.2"])
    with pytest.raises(ImportFileError, match=r"direction\.10"):
        import_vector(path, "direction.3")


def test_a_vector_as_a_head_reads_the_projection_and_adds_itself(tmp_path: Path) -> None:
    vector = torch.tensor([3.0, 0.0, -4.0])
    save_file({"difference": vector[None]}, tmp_path / "v.safetensors")
    head = import_vector(tmp_path / "v.safetensors").head(scale=2.0)
    assert head.value(torch.tensor([[5.0, 1.0, 0.0]])).item() == pytest.approx(3.0)
    assert torch.equal(head.folded_ascent(), 2.0 * vector[None])


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        ({"a": torch.zeros(3)}, "zero or not finite"),
        ({"a": torch.full((3,), float("nan"))}, "zero or not finite"),
        ({"a": torch.ones(2, 3)}, "a vector was expected"),
        ({"a": torch.ones(3), "b": torch.ones(3)}, "there are: a, b"),
    ],
)
def test_a_file_without_one_usable_vector_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], what: str
) -> None:
    save_file(tensors, tmp_path / "v.safetensors")
    with pytest.raises(ImportFileError, match=what):
        import_vector(tmp_path / "v.safetensors")


@pytest.mark.parametrize("suffix", ["gguf", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello world", b"GGUF" + b"\xff" * 60, b"\x00" * 64])
def test_bytes_that_are_no_vector_file_are_one_clear_error(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"v.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ImportFileError, match=f"not a {suffix} file"):
        import_vector(path)
    with pytest.raises(ImportFileError, match="No such file"):
        import_vector(tmp_path / f"none.{suffix}")
