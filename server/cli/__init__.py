"""The `recontrol` command: serve, generate, compare, heads, rollouts, train, eval, bench.

Each subcommand is a settings class: its fields are the flags, and RECONTROL_* variables mean the same. The only
package that sees both the server and the training side of `value_models`. Enter at `main`; to add a command, write one
class and put it in COMMANDS.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence

from pydantic import ValidationError
from pydantic_settings import BaseSettings, CliApp, SettingsError

from server.errors import RecontrolError

COMMANDS = {
    "serve": "server.cli.serve:Serve",
    "generate": "server.cli.generate:Generate",
    "compare": "server.cli.generate:Compare",
    "heads list": "server.cli.heads:HeadsList",
    "heads show": "server.cli.heads:HeadsShow",
    "heads import": "server.cli.heads:HeadsImport",
    "heads publish": "server.cli.heads:HeadsPublish",
    "heads report": "server.cli.report:HeadsReport",
    "prompts": "server.cli.train:Prompts",
    "rollouts": "server.cli.train:Rollouts",
    "train": "server.cli.train:Train",
    "eval": "server.cli.evaluate:Eval",
    "bench": "server.cli.bench:Bench",
}
"""Where each class is. Only that of the command that runs is imported, so that a server starts without the others'
libraries."""


def command_class(name: str) -> type[BaseSettings]:
    module, _, class_name = COMMANDS[name].partition(":")
    return getattr(importlib.import_module(module), class_name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it went well, 2 for a mistake of the user's, said in one line on stderr."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = next((n for n in (" ".join(words[:2]), " ".join(words[:1])) if n in COMMANDS), None)
    if name is None:
        is_asked = bool({"-h", "--help"} & set(words))
        print(_usage(), file=sys.stdout if is_asked else sys.stderr)
        return 0 if is_asked else 2
    command = command_class(name)
    command.model_config["cli_prog_name"] = f"recontrol {name}"
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        CliApp.run(command, cli_args=words[len(name.split()) :])
    except SystemExit as end:
        # argparse has said what it had to say: help, or a flag that does not exist.
        return end.code if isinstance(end.code, int) else 1
    except ValidationError as error:
        for problem in error.errors():
            where = ".".join(map(str, problem["loc"]))
            message = problem["msg"].removeprefix("Value error, ")
            print(f"recontrol {name}: {where + ': ' if where else ''}{message}", file=sys.stderr)
        return 2
    except (RecontrolError, SettingsError, ValueError, OSError) as error:
        print(f"recontrol {name}: {error}", file=sys.stderr)
        return 2
    return 0


def _usage() -> str:
    lines = [f"  recontrol {name:13}{(command_class(name).__doc__ or '').splitlines()[0]}" for name in COMMANDS]
    return "\n".join(["Usage: recontrol COMMAND [--help]", "", *lines])
