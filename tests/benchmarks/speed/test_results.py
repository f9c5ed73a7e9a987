"""The figures on the project's pages are those of the files that its benchmarks and its soak wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import (
    critic,
    critic_sampling,
    fields,
    fields_sampling,
    guidance,
    reward_levels,
    reward_search,
    tool_calls,
    training_memory,
)
from benchmarks.dialogues import report as dialogues
from benchmarks.edit import command as edit
from benchmarks.guard import report as guard
from benchmarks.judges import command as judges
from benchmarks.pinned import report as pinned
from benchmarks.roads import report as roads
from benchmarks.speed import report
from tests.soak.command import soak_table

PAGES = "\n".join(page.read_text() for page in [Path("README.md"), *sorted(Path("docs").rglob("*.md"))])
RESULTS = sorted(Path("benchmarks/results").glob("*.json"))


RENDERERS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "critic": (critic.Critics.section, critic.table),
    "critic-sampling": (critic_sampling.CriticSampling.section, critic_sampling.table),
    "dialogues": (dialogues.SECTION, dialogues.tables),
    "edit-launches": (edit.SECTION, edit.table),
    "fields": (fields.Fields.section, fields.table),
    "fields-sampling": (fields_sampling.FieldsSampling.section, critic_sampling.table),
    "guard": (guard.SECTION, guard.table),
    "guidance": (guidance.SECTION, guidance.table),
    "judges": (judges.Judges.section, judges.table),
    "pinned": (pinned.SECTION, pinned.table),
    "reward-levels": (reward_levels.SECTION, reward_levels.table),
    "reward-search": (reward_search.RewardSearch.section, reward_search.table),
    "roads": (roads.SECTION, roads.table),
    "tool-calls": ("bench-tool-calls", tool_calls.table),
    "training-memory": (training_memory.SECTION, training_memory.table),
}
"""By file; the others are of the benchmark of speed and of the soak."""


def sections(path: Path) -> dict[str, str]:
    result = json.loads(path.read_text())
    if path.stem in RENDERERS:
        name, render = RENDERERS[path.stem]
        return {name: render(result)}
    return report.named({"soak": soak_table(result)}, result) if "soak" in result else report.sections(result)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_page_shows_what_the_file_holds(path: Path) -> None:
    for name, body in sections(path).items():
        between = PAGES.split(f"<!-- {name}: begin -->")[1].split(f"<!-- {name}: end -->")[0]
        assert between.strip() == body


def test_every_section_has_its_file_and_every_file_its_sections() -> None:
    written = [name for path in RESULTS for name in sections(path)]
    assert sorted(written) == sorted(re.findall(r"<!-- (bench[\w-]*): begin -->", PAGES))
    assert {"bench-offline", "bench-online", "bench-step", "bench-soak", "bench-vllm"} <= set(written)
