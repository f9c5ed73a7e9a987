"""The pages' figures of speed are those of the files that the benchmarks wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from server.bench import report

PAGES = "".join(path.read_text() for path in sorted(Path("docs").glob("*.md")))
RESULTS = sorted(Path(report.__file__).parent.glob("results/*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_pages_show_what_the_file_holds(path: Path) -> None:
    for name, body in report.sections(json.loads(path.read_text())).items():
        between = PAGES.split(f"<!-- {name}: begin -->")[1].split(f"<!-- {name}: end -->")[0]
        assert between.strip() == body


def test_every_section_has_its_file_and_every_file_its_sections() -> None:
    written = [name for path in RESULTS for name in report.sections(json.loads(path.read_text()))]
    assert sorted(written) == sorted(re.findall(r"<!-- (bench[\w-]*): begin -->", PAGES))
    assert {"bench-offline", "bench-online", "bench-step", "bench-soak", "bench-vllm"} <= set(written)
