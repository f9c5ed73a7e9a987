"""The commands of `recontrol`: serve, generate, compare, heads, rollouts, pairs, score, train, calibrate, eval.

Each subcommand is a settings class: its fields are the flags, and RECONTROL_* variables mean the same. Enter at `main`;
to add a command, write one class and put it in COMMANDS.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import inspect
import logging
import os
import re
import shlex
import sys
from collections.abc import Sequence
from contextvars import ContextVar
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, CliApp, CliSettingsSource, SettingsError

from server.environment import no_such_setting, no_such_variable, unknown_variable
from server.errors import ConfigurationError, RecontrolError
from server.logs import TextFormatter, printable
from server.machine import let_waiting_threads_sleep, limit_threads
from server.settings import Settings
from value_models.errors import ValueModelError

COMMANDS = {
    "serve": "server.cli.serve:Serve",
    "generate": "server.cli.generate:Generate",
    "compare": "server.cli.generate:Compare",
    "heads list": "server.cli.heads:HeadsList",
    "heads show": "server.cli.heads:HeadsShow",
    "heads import": "server.cli.heads:HeadsImport",
    "heads publish": "server.cli.heads:HeadsPublish",
    "prompts": "server.cli.train:Prompts",
    "rollouts": "server.cli.rollouts:Rollouts",
    "pairs": "server.cli.pairs:Pairs",
    "score": "server.cli.given_texts:Score",
    "train": "server.cli.train:Train",
    "calibrate": "server.cli.calibrate:Calibrate",
    "eval": "server.cli.evaluate:Eval",
}
"""Where each class is. Only that of the command that runs is imported, so that a server starts without the others'
libraries."""


_running: ContextVar[str] = ContextVar("running", default="recontrol")


def command_line() -> str:
    """The command that is running, with its flags, for files that tell what made them."""
    return _running.get()


def command_class(name: str) -> type[BaseSettings]:
    return _command_at(COMMANDS[name])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command of `recontrol`; its exit status, as `run` gives it."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = next((n for n in (" ".join(words[:2]), " ".join(words[:1])) if n in COMMANDS), None)
    if name is None:
        return _without_command(words)
    return run(COMMANDS[name], f"recontrol {name}", words[len(name.split()) :])


def run(path: str, program: str, words: Sequence[str]) -> int:
    """Run the command whose class is at `path`, such as `server.cli.serve:Serve`, with these flags.

    0 when it went well, 2 for a mistake of the user's, said in one line on stderr that begins with `program`. A mistake
    is a flag that is refused, what this program raises on purpose, or what the operating system refuses. Anything else
    is a mistake of the program's own and is raised, for its traceback to be reported.
    """
    limit_threads()
    let_waiting_threads_sleep()
    before = _running.set(f"{program} {shlex.join(words)}".strip())
    command = _command_at(path)
    command.model_config["cli_prog_name"] = program
    handler = logging.StreamHandler()
    handler.setFormatter(TextFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    try:
        _check_environment(command)
        flags = CliSettingsSource[Any](command, formatter_class=_HelpFormatter, cli_exit_on_error=False)
        CliApp.run(command, cli_args=list(words), cli_settings_source=flags)
    except SystemExit as end:
        # argparse has printed the help that was asked for.
        return end.code if isinstance(end.code, int) else 1
    except ValidationError as error:
        if error.title != command.__name__:
            # Not the flags are wrong, but something that this program made.
            raise
        _say(program, "; ".join(_text_of(problem, command) for problem in error.errors()))
        return 2
    except BrokenPipeError:
        # Whoever reads, such as `head`, has enough; what is still in the buffer must not fail at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (RecontrolError, ValueModelError, SettingsError, OSError) as error:
        # The prefix is pydantic-settings' own, of a flag that does not exist or lacks its value.
        _say(program, str(error).removeprefix("error parsing CLI: "))
        return 2
    finally:
        _running.reset(before)
    return 0


def _text_of(problem: ErrorDetails, command: type[BaseSettings]) -> str:
    where = ".".join(map(str, problem["loc"]))
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        message = no_such_setting(where, command.model_fields)
    return f"{where}: {message}" if where else message


def _say(program: str, message: str) -> None:
    """One line, whatever a library put into its message."""
    print(printable(f"{program}: {' '.join(message.split())}"), file=sys.stderr)


def _command_at(path: str) -> type[BaseSettings]:
    module, _, class_name = path.partition(":")
    return getattr(importlib.import_module(module), class_name)


def _check_environment(command: type[BaseSettings]) -> None:
    """Raises ConfigurationError for a RECONTROL_* variable that no command reads, which is most likely a typing error.

    One environment may serve several commands, but the others are looked at only when this one does not know a name.
    """
    own = {*command.model_fields, *Settings.model_fields}
    if unknown_variable(os.environ, own) is None:
        return
    fields = own.union(*(command_class(name).model_fields for name in COMMANDS))
    if unknown := unknown_variable(os.environ, fields):
        raise ConfigurationError(no_such_variable(unknown, own))


def _without_command(words: Sequence[str]) -> int:
    asked = " ".join(word for word in words[:2] if not word.startswith("-"))
    if words and words[0] == "--version":
        print(version("recontrol"))
        return 0
    if is_asked := bool({"-h", "--help"} & set(words)):
        print(_usage())
    elif words and not any(name.startswith(f"{asked} ") for name in COMMANDS):
        what = f"command {asked!r}" if asked else f"flag {words[0]!r}"
        _say("recontrol", f"there is no {what}; there are {', '.join(COMMANDS)}")
    else:
        print(_usage(words[:1]), file=sys.stderr)
    return 0 if is_asked else 2


def _usage(group: Sequence[str] = ()) -> str:
    """All commands, or those of a group such as `heads`."""
    lines = [
        f"  recontrol {name:15}{_summary(path)}"
        for name, path in COMMANDS.items()
        if name.split()[: len(group)] == list(group)
    ]
    return "\n".join(["Usage: recontrol COMMAND [--help]", "", *lines])


def _summary(path: str) -> str:
    """The first line of the class's docstring, read from its file: to import all commands takes many seconds."""
    module, _, class_name = path.partition(":")
    found = importlib.util.find_spec(module)
    assert found is not None
    assert found.origin is not None
    nodes = ast.parse(Path(found.origin).read_text(encoding="utf-8")).body
    (node,) = (node for node in nodes if isinstance(node, ast.ClassDef) and node.name == class_name)
    return (ast.get_docstring(node) or "").partition("\n")[0]


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Without what pydantic says of a default that is none: the text says what happens then."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return re.sub(r"\s*\(default: null\)|\s*\(default factory: \w+\)", "", super()._get_help_string(action) or "")

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return super()._fill_text(inspect.cleandoc(text), width, indent)
