"""benchmarks/gpu.sh on a CPU, where it goes through its parts with tiny shapes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from pathlib import Path

import pytest


def carried_out(out: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OUT": str(out), "WORK": str(out / "work"), **variables}
    return subprocess.run(
        ["bash", "benchmarks/gpu.sh", *words], capture_output=True, text=True, env=env, check=False, timeout=240
    )


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")
@pytest.mark.timeout(250)
def test_a_dry_run_writes_each_part_and_how_it_ended(tmp_path: Path) -> None:
    done = carried_out(tmp_path, "--dry-run", PARTS="edit offline-torch vllm")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["is_dry_run"] is True
    ends = {name: part["end"] for name, part in summary["parts"].items()}
    assert ends == {"edit": "done", "offline-torch": "done", "vllm": "left out: vLLM is not installed"}
    assert json.loads((tmp_path / "edit.json").read_text())["times"]
    arms = json.loads((tmp_path / "offline-torch.json").read_text())["offline"]
    assert {name: "batches" in arm for name, arm in arms.items()} == {"recontrol": True, "recontrol-1-head": True}


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
    limits = [int(word) for line in script.splitlines() if line.strip().startswith("case") and "echo" in line
              for word in line.replace(";;", " ").split() if word.isdigit()]  # fmt: skip
    assert len(limits) == 6
    assert sum(limits) <= 580
    assert script.count("$OUT/") >= 3
