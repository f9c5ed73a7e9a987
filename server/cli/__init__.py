"""The `recontrol` command: what installed scripts call. Its commands are in `program.py`.

Imports nothing that takes time, so that Ctrl-C ends the command from its first moment on. Enter at `main`, or at `run`
for a command that is not one of `recontrol`.
"""

from __future__ import annotations

from collections.abc import Sequence

from server.cli.signals import ending_at_once


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command of `recontrol`; its exit status, as `program.main` gives it."""
    with ending_at_once():
        from server.cli import program

        return program.main(argv)


def run(path: str, name: str, words: Sequence[str]) -> int:
    """Run the command whose class is at `path` under this name; its exit status, as `program.run` gives it."""
    with ending_at_once():
        from server.cli import program

        return program.run(path, name, words)
