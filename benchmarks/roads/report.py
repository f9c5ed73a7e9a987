"""The study's JSON as Markdown. Enter at `table` or `sections`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.markdown import header, row
from benchmarks.quality.tables import TITLES, interval, share, signed

SECTION = "bench-roads"
_COLUMNS = ("diversity", "coherence", "nll", "kl")
_CORE_MINUTE_S = 60.0


def sections(path: Path) -> dict[str, str]:
    """The section of a JSON file of this study."""
    return {SECTION: table(json.loads(path.read_text()))}


def table(result: Mapping[str, Any]) -> str:
    """A row for each road, between the base model and the shipped head."""
    scores = ["reward", *result["judges"]]
    titles = ["head from", "given", "core minutes", *scores, "wins over base", *(TITLES[name] for name in _COLUMNS)]
    lines = header([*titles, f"`{result['head']}`'s reward over it"])
    over = next(iter(reversed(result["arms"].values())))["gain_over"]
    for name, figures in result["arms"].items():
        road = result["roads"].get(name)
        cells = [name, road["given"], f"{road['core_s'] / _CORE_MINUTE_S:.1f}"] if road else [f"({name})", "", ""]
        cells += [interval(figures[score]) for score in scores]
        cells += [share(figures.get("win_over_base")), *(f"{figures[column]['mean']:.2f}" for column in _COLUMNS)]
        lines.append(row([*cells, signed(over[name]["reward"]) if name in over else ""]))
    sampling = result["sampling"]
    return "\n".join(
        [
            *lines,
            "",
            f"Rollouts, pairs and texts are of {result['num_training_prompts']} prompts; {result['num_prompts']} "
            f"held-out chats, {sampling['num_samples']} responses of {sampling['max_tokens']} tokens to each, 95% "
            "intervals over prompts. Each head is as strong as diverges as far as the shipped head at its default "
            f"strength, on {result['num_tuning_prompts']} validation prompts.",
            "",
            f"`{result['command']}`, {result['system']['cpu']}, {result['system']['date'][:10]}, commit "
            f"{result['system']['commit']}.",
        ]
    )
