"""`python -m tests.soak`: many mixed requests and faults at a real server, told as a table."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from benchmarks.speed import report
from benchmarks.speed.measurement import Measurement, Positive
from benchmarks.speed.setup import ModelSetup
from server.cli.command import read_prompts
from tests.soak import run

_MIB = 2**20


class Soak(Measurement):
    """Send many mixed requests and faults to a real server with a small cache; status 1 if any is lost."""

    section = "soak"

    num_requests: Positive = Field(10_000, description="sent in all, by 24 clients at a time")
    most_minutes: Positive = Field(60, description="after which nothing more is sent, and status 1")

    def cli_cmd(self) -> None:
        if failures := self.carry_out()["soak"]["failures"]:
            print("\n".join(failures), file=sys.stderr)
            sys.exit(1)

    def measure(self) -> dict[str, Any]:
        setup = ModelSetup(**self.model_setup())
        texts = [prompt.text for prompt in read_prompts(None)]
        names = ("device", "dtype", "threads", "seed")
        return {
            **self.about(),
            "settings": {"label": self.label, **{name: getattr(setup, name) for name in names}},
            "soak": run.measure(setup, count=self.num_requests, texts=texts, most_s=60.0 * self.most_minutes),
        }

    def sections(self, result: Mapping[str, Any]) -> dict[str, str]:
        return report.named({"soak": soak_table(result)}, result)


_RETRIES = {
    "429": "after 429",
    "503": "after 503",
    "timeout": "after a time without an answer",
    "broken": "over a new connection, where the old one was closed meanwhile",
}


def soak_table(result: Mapping[str, Any]) -> str:
    """What was sent, what was done to it, and what was lost."""
    soak = result["soak"]
    before, after = soak["held_before"], soak["held_after"]
    warm_up = soak["rss_warm_up_requests"]
    grown = _grown(soak["rss_growth_bytes"], warm_up)
    rows = {
        "requests": f"{soak['num_requests']}, by {soak['num_clients']} clients at a time",
        **_sent(soak),
        "answers by status": _listed(soak["by_status"]),
        "sent again": _listed({_RETRIES[reason]: count for reason, count in soak["retried"].items()}),
        "sequences ended": _listed(soak["sequences_ended"]),
        "**lost, ended twice or answered wrongly**": f"**{soak['num_lost']}**",
        "**run again alone: other than before**": f"**{soak['num_mismatches']}** of {soak['num_compared']}",
        "slots, waiting, keys and values at the end": ", ".join(f"{value:g}" for value in soak["at_end"].values()),
        "memory of the server, MiB": f"{_mib(before)} to {_mib(after)}{grown}",
        "threads of the server": f"{before['threads']} to {after['threads']}",
        "open files and sockets": f"{before['open_files']} to {after['open_files']}",
        "time, new tokens a second": f"{soak['seconds']:.0f} s, {soak['tokens_per_s']:.0f}; "
        f"{soak['compared_s']:.0f} s more alone",
        "failures of any kind": str(soak["num_failures"]),
    }
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    system = result["system"]
    where = f"{system['cpu']}, {result['settings']['threads']} threads, {result['settings']['dtype']}"
    return "\n".join(lines) + (
        f"\n\n`{result['command']}`, {result['model']}, {where}, seed {result['settings']['seed']}, {system['date']}, "
        f"commit {system['commit']}."
    )


def _sent(soak: Mapping[str, Any]) -> dict[str, str]:
    """The rows of what was sent."""
    faults = soak["faults"]
    wanted = {name: count for name, count in soak["by_kind"].items() if name != "bad input"}
    slow = {
        "sent their bodies in pieces": faults.get("slow body", 0),
        "sent half of them": faults.get("cut body", 0),
        "read late": faults.get("late reader", 0),
        f"read nothing, of which {soak['num_let_go']} had to be let go": faults.get("unread", 0),
    }
    return {
        "kinds": _listed(wanted),
        "of these under control": str(soak["features"].get("control", 0)),
        "bad input": f"{faults.get('bad input', 0)}, of {soak['bad_input_kinds']} kinds",
        "clients that hung up": f"{faults.get('disconnect', 0)} in mid-stream, {faults.get('cancel', 0)} at any time",
        "clients that were slow": _listed(slow),
        "deadlines": f"{faults.get('deadline', 0)}, of which {soak['num_expired']} passed",
        "crowds that left no room": str(faults.get("crowd", 0)),
    }


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "none"


def _mib(held: Mapping[str, int]) -> str:
    return f"{held['rss_bytes'] / _MIB:.0f}"


def _grown(growth_bytes: int | None, warm_up: int) -> str:
    return "" if growth_bytes is None else f"; {growth_bytes / _MIB:+.0f} after the first {warm_up} requests"
