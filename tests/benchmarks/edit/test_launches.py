"""What an edit launches on a GPU, counted on tensors without values, which needs neither a GPU nor Triton."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.edit import draws
from benchmarks.edit.cases import CASES, Shape, Step
from benchmarks.edit.command import main
from benchmarks.edit.launches import beyond_base
from tests.triton_interpreter import quicken

META = torch.device("meta")
SHAPE = Shape(8, 32, 500)
KERNELS = 5
"""The launches of rows of straight heads, however many and whatever they ask for."""
BEYOND = KERNELS - 1
"""The last of them widens the logits too, which is a launch of its own without control."""
BESIDE = 5
"""More where rows are over pinned control."""


@pytest.fixture(autouse=True)
def _by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECONTROL_KERNELS", "triton")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's interpreter, for what has values."""
    quicken(monkeypatch)
    with np.errstate(all="ignore"):
        yield


@pytest.mark.parametrize(
    "name", ["one head", "three heads mixed", "worst case of three heads", "a field of three features"]
)
def test_rows_of_straight_heads_take_five_launches_where_torch_takes_a_hundred(name: str) -> None:
    assert beyond_base(SHAPE, CASES[name], fuses=True) == BEYOND
    assert beyond_base(SHAPE, CASES[name], fuses=False) > 100


def test_rows_over_pinned_control_take_five_launches_more() -> None:
    assert beyond_base(SHAPE, CASES["a head over a pinned one"], fuses=True) == BEYOND + BESIDE
    assert beyond_base(SHAPE, CASES["a head over a pinned one"], fuses=False) > 500


def test_rows_under_a_soft_cap_take_a_launch_less_and_none_of_torchs() -> None:
    assert beyond_base(SHAPE, CASES["one head under a soft cap"], fuses=True) == BEYOND - 1
    assert beyond_base(SHAPE, CASES["one head under a soft cap"], fuses=False) > 100


def test_what_changes_from_token_to_token_travels_in_two_copies_more() -> None:
    assert beyond_base(SHAPE, CASES["gate, window and a response's budget"], fuses=True) == BEYOND + 2


def test_a_head_with_a_hidden_layer_leaves_its_search_to_the_kernels() -> None:
    by_kernels, by_torch = (
        beyond_base(SHAPE, CASES["a head with a hidden layer"], fuses=fuses) for fuses in (True, False)
    )
    assert by_kernels < 0.7 * by_torch


@pytest.mark.parametrize("name", CASES)
def test_the_number_of_launches_depends_on_no_number_of_rows(name: str) -> None:
    few, many = (beyond_base(Shape(rows, 32, 500), CASES[name], fuses=True) for rows in (8, 64))
    assert few == many


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("one head", "worst case of three heads"), KERNELS),
        (("a head over a pinned one", "three heads over three pinned ones"), KERNELS + BESIDE),
    ],
)
def test_the_same_launches_run_whatever_rows_ask_for(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, str], expected: int
) -> None:
    """So that a graph may record them; nothing can depend on numbers that tensors do not have."""
    recorded: list[list[object]] = []

    def launch(kernels: object, name: str, grid: tuple[int, ...], *arguments: object, **constants: object) -> None:
        tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
        recorded[-1].append((name, grid, [tensor.dtype for tensor in tensors], constants))

    monkeypatch.setattr("server.kernels.gpu.edit.EditKernels._launch", launch)
    step = Step(SHAPE, META)
    for name in names:
        step.control(CASES[name].rows(SHAPE.rows))
        recorded.append([])
        step.edit()
    assert len(recorded[0]) == expected
    assert recorded[0] == recorded[1]


@pytest.mark.parametrize("name", ["one head", "a head over a pinned one"])
def test_a_step_edited_twice_leaves_its_numbers_in_the_same_buffers(name: str) -> None:
    step = Step(SHAPE, META)
    step.control(CASES[name].rows(SHAPE.rows))
    kernels = step.editor.kernels_on(META)
    assert kernels is not None
    step.edit()
    before = dict(kernels._buffers)
    step.edit()
    assert before.keys() == kernels._buffers.keys()
    assert all(kernels._buffers[name] is buffer for name, buffer in before.items())


@pytest.mark.parametrize("name", draws.CASES)
def test_a_draw_is_one_launch_and_few_copies_however_many_rows_have_rules(name: str) -> None:
    few, many = (draws.count(rows, 500)[name] for rows in (4, 8))
    assert few["kernels"] == many["kernels"] == (2 if name == "top-p alone" else 5)
    assert few["torch"] > 40
    assert (few["torch"] < many["torch"]) == (name != "top-p alone")


def test_the_file_behind_the_page_holds_every_case() -> None:
    result = json.loads(Path("benchmarks/results/edit-launches.json").read_text())
    assert result["launches"].keys() == CASES.keys()
    assert result["draws"].keys() == draws.CASES.keys()


SIZES = ["--rows", "1,2", "--hidden", "32", "--vocabulary", "300", "--repeats", "1"]


def test_the_command_writes_launches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--out", str(tmp_path / "edit.json"), *SIZES])
    result = json.loads((tmp_path / "edit.json").read_text())
    assert result["launches"].keys() == CASES.keys()
    assert "times" not in result
    assert "| one head |" in capsys.readouterr().out


@pytest.mark.triton
@pytest.mark.usefixtures("quick")
def test_told_to_time_them_it_writes_times_too(tmp_path: Path) -> None:
    main(["--out", str(tmp_path / "edit.json"), "--time", *SIZES])
    result = json.loads((tmp_path / "edit.json").read_text())
    assert result["times"].keys() == result["launches"].keys() == CASES.keys()
    assert result["times"]["one head"].keys() == {"1", "2"}


def test_times_without_triton_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(SystemExit) as ended:
        main(["--out", str(tmp_path / "edit.json"), "--time"])
    assert ended.value.code == 2
    assert "--time: the package triton is not installed here" in capsys.readouterr().err
