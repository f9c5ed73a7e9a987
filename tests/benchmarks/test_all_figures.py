"""`benchmarks/figures.sh` remakes every file that the pages show, once, and goes on where it was stopped."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

RESULTS = {path.name for path in Path("benchmarks/results").glob("*.json")}
OF_A_GPU = {"gpu.json"}
STUB = """#!/bin/sh
echo "$(basename "$0") $*" >> "$LOG"
case "$*" in *"$FAILS"*) exit 3 ;; esac
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A folder with the project's benchmarks, and a `python` that writes down what it is asked to do."""
    (tmp_path / "benchmarks").symlink_to(Path("benchmarks").resolve())
    for name in ("python", "recontrol"):
        stub = tmp_path / "bin" / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(STUB)
        stub.chmod(0o755)
    return tmp_path


def run(folder: Path, *, fails: str = "nothing fails") -> list[str]:
    """The modules' lines of one run."""
    log = folder / "log"
    log.write_text("")
    environment = {"LOG": str(log), "FAILS": fails, "PATH": "/usr/bin:/bin"}
    subprocess.run(
        ["sh", "benchmarks/figures.sh", str(folder / "bin/python")], cwd=folder, env=environment, check=False
    )
    return log.read_text().splitlines()


def test_every_file_of_results_is_made_and_written_into_a_page(script: Path) -> None:
    lines = [line for line in run(script) if "--out" in line and "recontrol" not in line.split()[0]]
    made = {Path(out).name for line in lines for out in re.findall(r"--out (\S+)", line)}
    of_other_processors = {
        name for name in RESULTS if name.startswith(("amx", "avx2", "cpu")) and name != "cpu-soak.json"
    }
    assert RESULTS - OF_A_GPU - of_other_processors <= made
    for line in lines:
        # Figures of speed go into a page on the kinds of processor that pages are about.
        if "benchmarks.speed" not in line:
            assert Path(re.findall(r"--into (\S+)", line)[0]).exists()


def test_each_part_is_done_once_and_one_that_failed_is_begun_again(script: Path) -> None:
    until_it_failed = run(script, fails="benchmarks.dialogues")
    assert "benchmarks.dialogues" in until_it_failed[-1]
    again = [line for line in run(script) if "--out benchmarks/results" in line]
    assert "benchmarks.dialogues" in again[0]
    assert not [line for line in run(script) if "--out benchmarks/results" in line]
