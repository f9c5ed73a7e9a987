"""Heads that were made for another model, on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.cli import main
from tests.conftest import write_heads
from value_models.heads import ValueHead
from value_models.store import load_card, save_card


@pytest.fixture
def flags(heads: dict[str, ValueHead], load_tiny: Callable[..., Any], fine_tune: Path, tmp_path: Path) -> list[str]:
    """A fine-tune, and heads of the model that it was made from."""
    write_heads(tmp_path / "heads", {"good": heads["good"], "line": heads["line"]}, load_tiny().identity)
    for name in ("good", "line"):
        folder = tmp_path / "heads" / name
        save_card(folder, load_card(folder).model_copy(update={"reward": "brevity"}))
    return ["--model", str(fine_tune), "--dtype", "float32", "--device", "cpu", "--heads-dir", str(tmp_path / "heads")]


@pytest.fixture
def commands(flags: list[str], tmp_path: Path) -> dict[str, list[str]]:
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"id": f"p{i}", "format": "text", "prompt": f"prompt {i}"} for i in range(40)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    inputs = ["--prompts", str(prompts), "--formats", "text", "--num-samples", "1", "--methods", "best-of"]
    return {
        "generate": ["generate", "hi", "--head", "good", "--max-tokens", "4", *flags],
        "compare": ["compare", "hi", "--max-tokens", "4", *flags, "--out", str(tmp_path / "out.json")],
        "eval": ["eval", "good", *flags, *inputs, "--max-prompts", "1", "--max-tokens", "4", "--work",
                 str(tmp_path / "work"), "--out", str(tmp_path / "out.json")],
    }  # fmt: skip


@pytest.mark.parametrize("command", ["generate", "compare", "eval"])
def test_a_command_refuses_another_models_heads_in_one_line_or_uses_them_with_a_warning_when_told_so(
    command: str,
    commands: dict[str, list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert main(commands[command]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"recontrol {command}: The value head 'good' in ")
    assert last.endswith("or serve it all the same with --allow-other-base.")
    assert main([*commands[command], "--allow-other-base"]) == 0
    warned = [r.getMessage() for r in caplog.records if "was made for the model 'llama', not for" in r.getMessage()]
    assert len(warned) == 2
    if command != "generate":
        of_its_heads = warned[:1] if command == "eval" else warned
        assert json.loads((tmp_path / "out.json").read_text())["warnings"] == of_its_heads


def test_the_environment_allows_it_too(commands: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RECONTROL_ALLOW_OTHER_BASE", "true")
    assert main(commands["generate"]) == 0


def test_figures_of_a_fine_tune_are_not_kept_in_the_card_of_a_head_of_its_base(
    commands: dict[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = (tmp_path / "heads" / "good" / "card.json").read_text()
    assert main([*commands["eval"], "--allow-other-base", "--update-card"]) == 2
    assert "update_card: a card tells of the head's own model. The value head 'good'" in capsys.readouterr().err
    assert (tmp_path / "heads" / "good" / "card.json").read_text() == card


def test_rollouts_which_use_no_head_have_no_flag_for_heads(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in (["--heads-dir", "heads"], ["--allow-other-base"]):
        assert main(["rollouts", *flag]) == 2
        assert flag[0] in capsys.readouterr().err


def test_a_setting_of_that_name_is_in_flags_environment_and_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "server.toml").write_text("allow_other_base = true\n")
    for words, variables in (
        (["--allow-other-base"], {}),
        ([], {"RECONTROL_ALLOW_OTHER_BASE": "1"}),
        ([], {"RECONTROL_CONFIG": str(tmp_path / "server.toml")}),
    ):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            assert main(["serve", "--print-config", *words]) == 0
        assert json.loads(capsys.readouterr().out)["allow_other_base"] is True
