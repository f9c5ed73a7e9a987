"""What `make heads` would run: every line of it is a command that the command line accepts."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
from pydantic_settings import CliApp

from server.cli import COMMANDS, command_class


@pytest.fixture
def commands(tmp_path: Path) -> list[list[str]]:
    """The words of every call, from a run with a command that only writes them down."""
    recorder, log, shp = tmp_path / "recontrol", tmp_path / "log", tmp_path / "shp.jsonl"
    recorder.write_text(f'#!/bin/sh\nfor word in "$@"; do printf "%s\\0" "$word" >> {log}; done; echo >> {log}\n')
    recorder.chmod(0o755)
    shp.touch()
    subprocess.run(["sh", "value_models/make_heads.sh", str(recorder)], check=True, env={"SHP": str(shp)})
    return [line.split("\0")[:-1] for line in log.read_text().splitlines()]


def test_every_command_is_one_that_exists_with_flags_that_go_together(
    commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    for name in COMMANDS:
        monkeypatch.setattr(command_class(name), "cli_cmd", lambda self, name=name: ran.append(name), raising=False)
    for words in commands:
        name = next(n for n in (" ".join(words[:2]), words[0]) if n in COMMANDS)
        try:
            CliApp.run(command_class(name), cli_args=words[len(name.split()) :])
        except SystemExit as error:
            pytest.fail(f"{shlex.join(words)}: {error}")
    assert len(ran) == len(commands) > 20
    assert ran[0] == "prompts"
    assert ran[-1] == "heads report"
