"""The figures of speed on the project's pages are those of the files that `benchmarks.speed` and `tests.soak` wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import self_pairs, tool_calls, training_memory
from benchmarks.dialogues import report as dialogues
from benchmarks.pinned import report as pinned
from benchmarks.speed import report
from tests.soak.command import soak_table

PAGES = "\n".join(page.read_text() for page in [Path("README.md"), *sorted(Path("docs").rglob("*.md"))])
RESULTS = sorted(Path("benchmarks/results").glob("*.json"))


def sections(path: Path) -> dict[str, str]:
    result = json.loads(path.read_text())
    if "arms" in result:
        return {"bench-tool-calls": tool_calls.table(result)}
    if "arms_of_self_pairs" in result:
        return {self_pairs.SECTION: self_pairs.table(result)}
    if "training_runs" in result:
        return {training_memory.SECTION: training_memory.table(result)}
    if "attempts" in result:
        return {pinned.SECTION: pinned.table(result)}
    if "dialogues" in result:
        return {dialogues.SECTION: dialogues.tables(result)}
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
