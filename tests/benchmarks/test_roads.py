"""The study of roads to a head, end to end on a tiny model, and its table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.roads import COMMAND, PROGRAM, report
from benchmarks.roads.making import ROADS
from server.cli import run


def study(*words: str) -> int:
    return run(COMMAND, PROGRAM, words)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("roads") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": f"p{i}", "prompt": f"say {i}"}) + "\n" for i in range(60)))
    return path


@pytest.fixture(scope="module")
def flags(workshop: tuple[list[str], Path], chats: Path) -> list[str]:
    heads = shutil.copytree(workshop[1] / "heads", chats.parent / "shipped")
    size = ["--num-prompts", "40", "--rollout-samples", "3", "--num-samples", "1", "--max-tokens", "6"]
    place = ["--heads-dir", str(heads), "--work", str(chats.parent / "work"), "--max-batch-size", "8"]
    return ["short", *workshop[0], *place, "--prompts", str(chats), "--max-prompts", "4", *size]


@pytest.fixture(scope="module")
def result(flags: list[str], chats: Path) -> dict[str, Any]:
    out = chats.parent / "roads.json"
    assert study(*flags, "--out", str(out)) == 0
    return json.loads(out.read_text())


def test_every_road_leads_to_a_head_that_is_compared(result: dict[str, Any]) -> None:
    names = [road.name for road in ROADS]
    assert list(result["arms"]) == ["base", "the instruction itself", *names, "shipped head"]
    assert all(result["arms"][name]["kl"]["mean"] > 0 for name in names)
    assert set(result["arms"]["shipped head"]["gain_over"]) == set(names)


def test_the_time_of_rollouts_is_of_the_road_that_needs_them(result: dict[str, Any]) -> None:
    commands = {name: [line.split()[1] for line in road["commands"]] for name, road in result["roads"].items()}
    assert commands.pop("rollouts") == ["rollouts", "train"]
    assert commands.pop("own answers") == ["pairs", "train"]
    assert set(map(tuple, commands.values())) == {("train",)}
    assert all(road["core_s"] > 0 for road in result["roads"].values())


def test_what_was_made_is_used_again(result: dict[str, Any], flags: list[str], chats: Path) -> None:
    again = chats.parent / "again.json"
    assert study(*flags, "--out", str(again)) == 0
    assert json.loads(again.read_text())["roads"] == result["roads"]


def test_a_row_of_the_table_is_a_road(result: dict[str, Any]) -> None:
    lines = report.table(result).split("\n")
    assert [line.split(" | ")[0].lstrip("| ") for line in lines[3:-5]] == [
        "(the instruction itself)",
        *(road.name for road in ROADS),
    ]


def test_a_flag_that_the_study_does_not_use_is_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert study(*flags, "--methods", "prompting") == 2
    assert "methods: this study does not use it" in capsys.readouterr().err


def test_a_page_without_a_file_is_refused_before_anything_is_made(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert study(*flags, "--into", "page.md") == 2
    assert "into: goes with --out" in capsys.readouterr().err
