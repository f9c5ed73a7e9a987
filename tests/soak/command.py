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
            "soak": run.measure(setup, count=self.num_requests, texts=texts),
        }

    def sections(self, result: Mapping[str, Any]) -> dict[str, str]:
        return report.named({"soak": soak_table(result)}, result)


def soak_table(result: Mapping[str, Any]) -> str:
    """What was sent, what was done to it, and what was lost."""
    soak = result["soak"]
    faults = soak["faults"]
    kinds = soak["by_kind"]
    bad = faults.get("bad input", 0)
    series = [rss for _, rss in soak["rss_series"]] or [0]
    growth, warm_up = soak["rss_growth_bytes"], soak["rss_warm_up_requests"]
    grown = "" if growth is None else f", {growth / _MIB:+.0f} after the first {warm_up} requests"
    rows = {
        "requests": f"{soak['num_requests']}: "
        + ", ".join(f"{count} {kind}" for kind, count in kinds.items() if kind != "bad input"),
        "bad input": f"{bad}, of {soak['bad_input_kinds']} kinds",
        "clients that hung up": f"{faults.get('disconnect', 0)} in mid-stream, {faults.get('cancel', 0)} at any time",
        "deadlines": f"{faults.get('deadline', 0)}, of which {soak['num_expired']} passed",
        "answers 429, sent again": str(soak["num_429"]),
        "sequences ended": ", ".join(f"{count} {reason}" for reason, count in soak["sequences_ended"].items() if count),
        "**lost, ended twice or answered wrongly**": f"**{soak['num_lost']}**",
        "**run again alone: other than before**": f"**{soak['num_mismatches']}** of {soak['num_compared']}",
        "slots, waiting, keys and values at the end": ", ".join(f"{value:g}" for value in soak["at_end"].values()),
        "memory of the server, MiB": f"{series[0] / _MIB:.0f} to {series[-1] / _MIB:.0f}{grown}",
        "time, new tokens a second": f"{soak['seconds']:.0f} s, {soak['tokens_per_s']:.0f}",
        "failures of any kind": str(soak["num_failures"]),
    }
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    system = result["system"]
    where = f"{system['cpu']}, {result['settings']['threads']} threads, {result['settings']['dtype']}"
    return "\n".join(lines) + (
        f"\n\n`{result['command']}`, {result['model']}, {where}, seed {result['settings']['seed']}, {system['date']}, "
        f"commit {system['commit']}."
    )
