"""The `recontrol` command: serve, generate, compare, heads, rollouts, train, eval, bench.

Each subcommand is a settings class: its fields are the flags, and RECONTROL_* variables mean the same. The only
package that sees both the server and the training side of `value_models`. Enter at `main`; to add a command, write one
class and put it in COMMANDS.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from pydantic import ValidationError
from pydantic_settings import BaseSettings, CliApp, SettingsError

from server.cli.bench import Bench
from server.cli.evaluate import Eval
from server.cli.generate import Compare, Generate
from server.cli.heads import HeadsImport, HeadsList, HeadsPublish, HeadsShow
from server.cli.report import HeadsReport
from server.cli.serve import Serve
from server.cli.train import Prompts, Rollouts, Train
from server.errors import RecontrolError

COMMANDS: dict[str, type[BaseSettings]] = {
    "serve": Serve,
    "generate": Generate,
    "compare": Compare,
    "heads list": HeadsList,
    "heads show": HeadsShow,
    "heads import": HeadsImport,
    "heads publish": HeadsPublish,
    "heads report": HeadsReport,
    "prompts": Prompts,
    "rollouts": Rollouts,
    "train": Train,
    "eval": Eval,
    "bench": Bench,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it went well, 2 for a mistake of the user's, said in one line on stderr."""
    words = list(sys.argv[1:] if argv is None else argv)
    name = next((n for n in (" ".join(words[:2]), " ".join(words[:1])) if n in COMMANDS), None)
    if name is None:
        is_asked = bool({"-h", "--help"} & set(words))
        print(_usage(), file=sys.stdout if is_asked else sys.stderr)
        return 0 if is_asked else 2
    command = COMMANDS[name]
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
    lines = [f"  recontrol {name:13}{(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(["Usage: recontrol COMMAND [--help]", "", *lines])
