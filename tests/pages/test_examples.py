"""The programs in examples/; tests/test_real_model.py runs those that ask a server of the real model."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import httpx
import pytest
from fastapi import FastAPI

from server.app import create_app
from server.engines.fake import FakeEngine
from server.settings import Settings
from server.telemetry import Telemetry
from tests.api.conftest import make_embedded_app, serving
from tests.api.test_access import MANAGER
from tests.pages.pages import text_of

__all__ = ["make_embedded_app"]  # a fixture here too
CONTROLLED = {"model": "fake", "prompt": "hi", "max_tokens": 4, "control": {"objective": {"weights": {"plain": 1}}}}


def module_of(program: str) -> ModuleType:
    module = ModuleType(program)
    exec(compile(text_of(f"examples/{program}.py"), program, "exec"), module.__dict__)
    return module


def test_every_example_is_described_on_the_page_and_short() -> None:
    programs = sorted(path.name for path in Path("examples").glob("*.py"))
    assert len(programs) == 10
    assert all(f"]({name})" in text_of("examples/README.md") for name in programs)
    assert all(len(text_of(f"examples/{name}").splitlines()) < 120 for name in programs)


@pytest.mark.parametrize(("share", "status"), [("0.9", 0), ("-1", 1)])
def test_the_watcher_fires_when_budgets_hold_back_more_than_the_share(
    monkeypatch: pytest.MonkeyPatch, share: str, status: int
) -> None:
    watcher = module_of("watch_metrics")
    telemetry = Telemetry()
    with serving(create_app(Settings(), FakeEngine(observer=telemetry), telemetry)) as url:
        monkeypatch.setattr(time, "sleep", lambda _s: httpx.post(f"{url}/v1/completions", json=CONTROLLED))
        monkeypatch.setattr(sys, "argv", ["watch_metrics", "--url", url, "--share", share])
        assert watcher.main() == status


@pytest.mark.slow
def test_a_reward_of_ones_own_becomes_a_served_head(tmp_path: Path) -> None:
    """By the commands that a user would run, on fewer and shorter responses."""
    flags = ["--out", str(tmp_path), "--num-samples", "4", "--max-tokens", "16"]
    command = [sys.executable, "examples/own_reward.py", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "heads/kind/card.json").read_text())["reward"] == "own_reward:kindness"
    assert "base: " in done.stdout
    assert "with the head: " in done.stdout


def test_ten_pairs_become_a_head_that_is_compared_with_the_base_model(
    tmp_path: Path, model_folder: Callable[[], Path]
) -> None:
    command = [sys.executable, "examples/own_pairs.py", "--out", str(tmp_path), "--model", str(model_folder())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "heads/kind/card.json").read_text())["reward"] == "pairs of pairs.jsonl"
    assert "[base] " in done.stdout
    assert "[kind] " in done.stdout


def test_a_server_that_runs_makes_a_head_of_pairs_and_answers_under_it(
    make_embedded_app: Callable[..., FastAPI],
) -> None:
    with serving(make_embedded_app(management_keys=MANAGER)) as url:
        command = [sys.executable, "examples/train_over_http.py", "--url", url, "--management-key"]
        done = subprocess.run([*command, MANAGER], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "trained in " in done.stdout
        assert "[base] " in done.stdout
        assert "[kind] " in done.stdout
        done = subprocess.run([*command, "wrong"], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "management key" in done.stderr


@pytest.mark.slow
def test_a_sentence_becomes_a_served_head(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """On a tiny model, which shows that the commands fit together."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"id": f"p{i}", "prompt": f"say {i}"}) + "\n" for i in range(40)))
    flags = ["--out", str(tmp_path), "--model", str(model_folder("llama")), "--prompts", str(prompts)]
    command = [sys.executable, "examples/own_instruction.py", *flags, "--max-tokens", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "mine/card.json").read_text())["reward"] == "instruction"
    assert "base:" in done.stdout
    assert "with the head:" in done.stdout
