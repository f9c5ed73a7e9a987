"""What an edit launches on a GPU, counted on tensors without values."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.edit.cases import CASES, Shape, Step
from benchmarks.edit.command import main, table
from benchmarks.edit.launches import count
from tests.triton_interpreter import quicken

RESULT = json.loads(Path("benchmarks/results/edit-launches.json").read_text())
pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
KERNELS = 5
"""The launches of rows of linear heads, however many and whatever they ask for."""
BEYOND = KERNELS - 1
"""The last of them widens the logits too, which is a launch of its own without control."""


@pytest.fixture(autouse=True)
def _by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RECONTROL_KERNELS", "triton")
    if importlib.util.find_spec("triton"):
        quicken(monkeypatch)
    with np.errstate(all="ignore"):
        yield


def test_rows_of_linear_heads_take_five_launches_where_torch_takes_a_hundred() -> None:
    counted = count(Shape(16, 32, 500))
    assert counted.keys() == CASES.keys()
    for name in ("one head", "three heads mixed", "worst case of three heads"):
        assert counted[name]["kernels"] == BEYOND
        assert counted[name]["torch"] > 100


def test_what_changes_from_token_to_token_travels_in_two_copies_more() -> None:
    assert count(Shape(16, 32, 500))["gate, window and a response's budget"]["kernels"] == BEYOND + 2


def test_a_head_with_a_hidden_layer_leaves_its_search_to_the_kernels() -> None:
    counted = count(Shape(16, 32, 500))["a head with a hidden layer"]
    assert counted["kernels"] < 0.7 * counted["torch"]


@pytest.mark.parametrize("name", CASES)
def test_the_number_of_launches_depends_on_no_number_of_rows(name: str) -> None:
    few, many = (count(Shape(rows, 32, 500))[name]["kernels"] for rows in (8, 64))
    assert few == many


def test_the_same_launches_run_whatever_the_numbers_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a graph may record them: grids, and the addresses of what kernels leave for each other."""
    recorded: list[list[object]] = []

    def launch(kernels: object, kernel: object, grid: tuple[int, ...], *arguments: object, **constants: object) -> None:
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        recorded[-1].append((kernel, grid, [(t.shape, t.dtype) for t in tensors], constants))

    monkeypatch.setattr("server.kernels.gpu.edit.EditKernels._launch", launch)
    step = Step(Shape(4, 32, 500), torch.device("cpu"), torch.float32)
    for name in ("one head", "worst case of three heads"):
        step.control(CASES[name](4))
        step.hidden_BD = step.hidden_BD * 3
        recorded.append([])
        step.edit()
    assert len(recorded[0]) == KERNELS
    assert [entry[:2] for entry in recorded[0]] == [entry[:2] for entry in recorded[1]]  # type: ignore[index]


def test_a_step_edited_twice_leaves_its_numbers_at_the_same_addresses() -> None:
    step = Step(Shape(4, 32, 500), torch.device("cpu"), torch.float32)
    step.control(CASES["one head"](4))
    kernels = step.editor.kernels_on(torch.device("cpu"))
    assert kernels is not None
    step.edit()
    before = {name: buffer.data_ptr() for name, buffer in kernels._buffers.items()}
    step.edit()
    assert {name: buffer.data_ptr() for name, buffer in kernels._buffers.items()} == before


def test_the_page_shows_what_was_counted() -> None:
    assert table(RESULT) in Path("docs/performance.md").read_text()
    assert RESULT["launches"].keys() == CASES.keys()


def test_the_command_writes_launches_and_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "edit.json"
    sizes = ["--rows", "1,2", "--hidden", "32", "--vocabulary", "300", "--repeats", "1"]
    main(["--out", str(out), "--time", *sizes])
    result = json.loads(out.read_text())
    assert result["times"].keys() == result["launches"].keys() == CASES.keys()
    assert result["times"]["one head"].keys() == {"1", "2"}
    assert "| one head |" in capsys.readouterr().out
