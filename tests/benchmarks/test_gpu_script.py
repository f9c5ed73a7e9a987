"""benchmarks/gpu.sh on a CPU, where it goes through its parts with tiny shapes."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest


def carried_out(out: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OUT": str(out), "WORK": str(out / "work"), **variables}
    return subprocess.run(
        ["bash", "benchmarks/gpu.sh", *words], capture_output=True, text=True, env=env, check=False, timeout=240
    )


def ends(out: Path) -> dict[str, str]:
    summary = json.loads((out / "summary.json").read_text())
    assert summary["is_dry_run"] is True
    return {name: part["end"] for name, part in summary["parts"].items()}


@pytest.mark.triton
@pytest.mark.timeout(250)
def test_a_dry_run_writes_each_part_and_how_it_ended(tmp_path: Path) -> None:
    done = carried_out(tmp_path, "--dry-run", PARTS="edit offline-torch")
    assert done.returncode == 0, done.stdout + done.stderr
    assert ends(tmp_path) == {"edit": "done", "offline-torch": "done"}
    assert json.loads((tmp_path / "edit.json").read_text())["times"]
    arms = json.loads((tmp_path / "offline-torch.json").read_text())["offline"]
    assert {name: "batches" in arm for name, arm in arms.items()} == {"recontrol": True, "recontrol-1-head": True}


def test_a_part_that_fails_is_told_and_the_next_one_is_carried_out(tmp_path: Path) -> None:
    """Told as such by a Python that can do nothing but say that there is no vLLM."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    done = carried_out(tmp_path, "--dry-run", PARTS="edit vllm", PYTHON=str(python))
    assert done.returncode == 1
    assert ends(tmp_path) == {"edit": "failed with status 1", "vllm": "left out: vLLM is not installed"}


@pytest.mark.parametrize(
    ("words", "variables", "told"),
    [(["--dry"], {}, "'--dry' is not known"), (["--dry-run"], {"PARTS": "edits"}, "there is no edits; there are edit")],
    ids=["flag", "part"],
)
def test_what_is_not_known_ends_it_with_status_2(
    words: list[str], variables: dict[str, str], told: str, tmp_path: Path
) -> None:
    done = carried_out(tmp_path, *words, **variables)
    assert (done.returncode, told in done.stderr) == (2, True)
    assert not (tmp_path / "summary.json").exists()


def test_its_parts_fit_into_ten_minutes_and_their_files_into_what_comes_back() -> None:
    script = Path("benchmarks/gpu.sh").read_text()
    (told,) = re.findall(r"(?m)^limit_of\(\) \{\n(.*)\n\}", script)
    limits = [int(limit) for limit in re.findall(r"echo (\d+)", told)]
    assert len(limits) == 6
    assert sum(limits) <= 580
    assert script.count("$OUT/") >= 3
