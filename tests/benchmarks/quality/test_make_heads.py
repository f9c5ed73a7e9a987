"""What `make heads` would run: every line of it is a command that exists, with flags that go together."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
from pydantic_settings import BaseSettings, CliApp

from benchmarks.quality import PROGRAM
from benchmarks.quality.command import Quality
from benchmarks.quality.report import Report
from server.cli.program import COMMANDS, command_class


@pytest.fixture
def commands(tmp_path: Path) -> list[list[str]]:
    """The words of every call, from a run with programs that only write them down."""
    log, shp = tmp_path / "log", tmp_path / "shp.jsonl"
    for program in ("recontrol", "python"):
        recorder = tmp_path / program
        write = f'for word in {program} "$@"; do printf "%s\\0" "$word" >> {log}; done; echo >> {log}'
        recorder.write_text(f"#!/bin/sh\n{write}\n")
        recorder.chmod(0o755)
    shp.touch()
    script = "benchmarks/quality/make_heads.sh"
    subprocess.run(["sh", script, str(tmp_path / "python")], check=True, env={"SHP": str(shp), "PATH": "/usr/bin:/bin"})
    return [line.split("\0")[:-1] for line in log.read_text().splitlines()]


def test_every_command_is_one_that_exists_with_flags_that_go_together(
    commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    known: dict[str, type[BaseSettings]] = {f"recontrol {name}": command_class(name) for name in COMMANDS}
    known |= {f"{PROGRAM}.report": Report, PROGRAM: Quality}
    ran: list[str] = []
    for name, command in known.items():
        monkeypatch.setattr(command, "cli_cmd", lambda self, name=name: ran.append(name), raising=False)
    for words in commands:
        name = next(name for number in (3, 2) if (name := " ".join(words[:number])) in known)
        try:
            CliApp.run(known[name], cli_args=words[len(name.split()) :])
        except SystemExit as error:
            pytest.fail(f"{shlex.join(words)}: {error}")
    assert len(ran) == len(commands) > 20
    assert ran[0] == "recontrol prompts"
    assert ran[-1] == f"{PROGRAM}.report"
    assert ran.count(PROGRAM) > 15
