"""Tables of what an engine does with long prompts and beside others on its machine. Enter at the two functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.speed.cells import arm_name, arm_row, head, our_figures, rate_cell, ratio
from benchmarks.speed.long_prompts import NUM_AHEAD, NUM_STREAMS
from benchmarks.speed.neighbours import ALONE, BUSY, TWO


def long_table(result: Mapping[str, Any]) -> str:
    """How fast long prompts are read alone, then what streams beside them and a short prompt behind them notice."""
    part = result.get("long")
    if not part:
        return ""
    lengths = [str(length) for length in result["settings"]["long_prompts"]]
    tables = [_alone_table(result, part["alone"], lengths)]
    if part["beside"]:
        tables.append(_beside_table(result, part["beside"], lengths))
    return "\n\n".join(tables)


def neighbours_table(result: Mapping[str, Any]) -> str:
    """Tokens a second in each condition, and by turns of the same run the share of those alone."""
    arms = result.get("neighbours")
    if not arms:
        return ""
    rows = result["settings"]["neighbour_rows"]
    titles = [f"new tokens a second, {rows} rows", "alone", "beside a busy core", "over alone"]
    lines = head([*titles, "two at once, together", "over one alone"])
    for arm, figures in arms.items():
        conditions = figures["conditions"]
        cells = [_condition(arms, arm, ALONE)]
        for condition in (BUSY, TWO):
            cells += [_condition(arms, arm, condition), None]
            if condition in conditions:
                rates = [conditions[one]["tokens_per_s"]["all"] for one in (condition, ALONE)]
                cells[-1] = ratio(*rates)
        lines.append(arm_row([arm_name(arm, result)], cells, figures))
    return "\n".join(lines)


def _alone_table(result: Mapping[str, Any], arms: Mapping[str, Any], lengths: list[str]) -> str:
    titles = [title for length in lengths for title in (f"{length} tokens: first token, s", "prompt tokens a second")]
    lines = head(["long prompts, alone", *titles, f"a token's cost, {lengths[-1]} over {lengths[0]}"])
    for arm, figures in arms.items():
        measured = figures["lengths"]
        cells: list[str | None] = []
        for length in lengths:
            if length in measured:
                one = measured[length]
                cells += [f"{one['ttft_s']['median']:.2f}", _rate(one, our_figures(arms, arm, "lengths", length))]
            else:
                cells += [None, None]
        ends = [measured[length]["tokens_per_s"]["all"] for length in (lengths[0], lengths[-1]) if length in measured]
        cells.append(ratio(*ends) if len(ends) == 2 else None)
        lines.append(arm_row([arm_name(arm, result)], cells, figures))
    return "\n".join(lines)


def _beside_table(result: Mapping[str, Any], arms: Mapping[str, Any], lengths: list[str]) -> str:
    titles = [
        title
        for length in lengths
        for title in (f"{length} tokens: longest gap / usual, ms", "ratio", f"short behind {NUM_AHEAD}, s (alone)")
    ]
    lines = head([f"beside {NUM_STREAMS} streams", *titles])
    for arm, figures in arms.items():
        cells: list[str | None] = []
        for length in lengths:
            one = figures["lengths"].get(length)
            if one is None:
                cells += [None] * 3
                continue
            median = {key: spread["median"] for key, spread in one.items()}
            cells.append(f"{1000 * median['longest_gap_s']:.0f} / {1000 * median['usual_gap_s']:.0f}")
            cells.append(f"{median['gap_ratio']:.1f}")
            cells.append(f"{median['short_behind_s']:.2f} ({median['short_alone_s']:.2f})")
        lines.append(arm_row([arm_name(arm, result)], cells, figures))
    return "\n".join(lines)


def _rate(figures: Mapping[str, Any], mine: Mapping[str, Any] | None) -> str:
    return rate_cell(figures["tokens_per_s"], mine)


def _condition(arms: Mapping[str, Any], arm: str, condition: str) -> str | None:
    figures = arms[arm]["conditions"].get(condition)
    return figures and _rate(figures, our_figures(arms, arm, "conditions", condition))
