"""The study's JSON as Markdown. Enter at `table`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.markdown import header, row, with_range

SECTION = "bench-pinned"


def table(result: Mapping[str, Any]) -> str:
    """A row for each attempt, with the change of the head's value and whether it is a fall beyond chance."""
    lines = header(["field and value", "documented as", "value", "change, 95%", "reward", "falls"])
    for name, scores in (("(without pinning)", result["without"]), ("(pinning alone)", result["alone"])):
        lines.append(row([name, "", f"{scores['value']:.3f}", "", f"{scores['reward']:.3f}", ""]))
    for attempt in result["attempts"]:
        change = attempt["change"]
        told = with_range(change, "+.3f")
        if attempt["against"] != "alone":
            told += "*"
        falls = "yes" if change["high"] < 0 else "no"
        lines.append(
            row([attempt["field"], attempt["kind"], f"{attempt['value']:.3f}", told, f"{attempt['reward']:.3f}", falls])
        )
    return "\n".join(
        [
            *lines,
            "",
            f"{result['num_prompts']} prompts, {result['max_tokens']} new tokens, seed {result['seed']}, pinned "
            "`positive` of weight 1. The value is the head's, of the finished text; the reward is VADER's score of it. "
            "\\* against the same prefill without pinning.",
            "",
            f"`{result['command']}`, {result['system']['cpu']}, {result['system']['date'][:10]}.",
        ]
    )
