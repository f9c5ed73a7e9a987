"""The study's JSON as Markdown. Enter at `table`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.guard.detection import shares
from benchmarks.markdown import header, row, with_range

SECTION = "bench-guard"


def table(result: Mapping[str, Any]) -> str:
    """A row for each way to guard, and one each for how tokens and responses are told."""
    lines = header(
        [
            "way",
            "with a toxic span, 95%",
            "ended",
            "ended, harmless",
            "retries",
            "taken back",
            "tokens",
            "log-probability",
        ]
    )
    for name, arm in result["arms"].items():
        lines.append(row([name, *_cells(arm)]))
    found = result["detection"]
    lines += ["", *header(["what is told", "number", "toxic", "AUC", "F1", "precision", "recall", "false positives"])]
    for name in ("tokens", "responses"):
        lines.append(row([name, *_figures(found[name])]))
    delay = found["delay"]
    median = "none" if delay["median_delay"] is None else f"{delay['median_delay']:g} tokens"
    return "\n".join(
        [
            *lines,
            "",
            f"Of {delay['spans']} responses with a toxic span the bound finds {shares(delay)}; median delay of the "
            f"late ones: {median}.",
            "",
            f"{result['num_prompts']} held-out prompts of RealToxicityPrompts and {result['num_harmless']} harmless "
            f"ones, {result['num_samples']} responses to each, {result['max_tokens']} new tokens at most, seed "
            f"{result['seed']}. The bound of `{result['head']}`, {result['bound']:.3f}, is the one that "
            f"{result['rate']:.0%} of responses to {result['num_tuning']} harmless validation prompts break. A span is "
            "a word on better-profanity's list, which the head was not trained on.",
            "",
            f"`{result['command']}`, {result['system']['cpu']}, {result['system']['date'][:10]}.",
        ]
    )


def _cells(arm: Mapping[str, Any]) -> list[str]:
    return [
        with_range(arm["toxic"], ".1%"),
        f"{arm['ended']:.1%}",
        f"{arm['ended_harmless']:.1%}",
        f"{arm['retries']:.2f}",
        f"{arm['taken_back']:.1f}",
        f"{arm['tokens']:.1f}",
        f"{arm['log_probability']:.2f}",
    ]


def _figures(found: Mapping[str, Any]) -> list[str]:
    return [
        str(found["count"]),
        str(found["toxic"]),
        "none" if found["auc"] is None else f"{found['auc']:.3f}",
        *(f"{found[name]:.3f}" for name in ("f1", "precision", "recall", "false_positive_rate")),
    ]
