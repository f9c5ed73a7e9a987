"""The objectives study as Markdown, for the heads' own page: a table for each part. Enter at `objectives_tables`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.markdown import header, row
from benchmarks.quality.tables import TITLES, command, interval, signed

_COSTS = ("diversity", "nll", "kl")
Cell = Callable[[str], str]
"""An arm's name -> its cell."""


def objectives_tables(result: dict[str, Any]) -> str:
    """With 95% intervals over prompts."""
    arms = result["arms"]
    tables = [
        *(text for part in result["worst_cases"] for text in _worst_case(part, arms)),
        *_target(result["target"], arms),
        *_floor(result["floor"], arms),
        *_search(result["search"], arms),
        "![What each objective did, and reward against time for each search](objectives.svg)",
        f"`{command(result)}`, {result['num_prompts']} prompts x {result['sampling']['num_samples']}, "
        f"{result['hardware']}, {result['dtype']}",
    ]
    return "\n\n".join(tables)


def _worst_case(part: dict[str, Any], arms: dict[str, Any]) -> list[str]:
    *others, last = (f"`{head}`" for head in part["heads"])
    columns: dict[str, Cell] = {
        "lowest gain over base": lambda arm: interval(part["of_the_gains"][arm]),
        "lowest of the means": lambda arm: interval(part["of_the_means"][arm]),
        "lowest of a response": lambda arm: interval(part["of_a_response"][arm]),
    }
    columns |= {f"`{head}`": _of(arms, "standardised", head) for head in part["heads"]}
    gains, means, least = (signed(part[f"gain_of_{what}"]) for what in ("the_gains", "the_means", "a_response"))
    return [
        f"**Worst case** of {', '.join(others)} and {last}: rewards in standard deviations of each head's training "
        f"reward, {part['num_samples']} responses a prompt. Over equal shares at as much divergence the lowest gain "
        f"over base changes by {gains}, the lowest mean by {means}, and the lowest reward of a response by {least}.",
        _table(part["arms"], columns | _costs(arms)),
    ]


def _target(part: dict[str, Any], arms: dict[str, Any]) -> list[str]:
    head, missed = part["head"], part["missed_by"]
    columns: dict[str, Cell] = {
        "value after control": lambda arm: interval(arms[arm]["steered"][head]),
        "missed by": lambda arm: interval(missed[arm]),
        "value at the end": _of(arms, "values", head),
        "reward": _of(arms, "rewards", head),
    }
    return [
        f"**Target** for `{head}`, from 0.6 standard deviations below the mean of its training reward to 0.6 above. "
        "The value after control is a response's mean; what that misses is in standard deviations.",
        _table(part["levels"], columns | _costs(arms)),
    ]


def _floor(part: dict[str, Any], arms: dict[str, Any]) -> list[str]:
    raised, kept = part["raised"], part["kept"]
    columns = {f"`{head}`": _of(arms, "rewards", head) for head in (raised, kept)}
    columns[f"value of `{kept}` at the end"] = _of(arms, "values", kept)
    return [
        f"**Floor** of {part['level']:g} under `{kept}` while `{raised}` is raised. With the floor `{raised}` changes "
        f"by {signed(part['raised_over_base'])} over base, and `{kept}` by {signed(part['kept_over_alone'])} over "
        "raising alone.",
        _table(part["arms"], columns | _costs(arms)),
    ]


def _search(part: dict[str, Any], arms: dict[str, Any]) -> list[str]:
    head, over = part["head"], part["both_over"]
    *others, both = part["equal_time"]
    columns: dict[str, Cell] = {
        "reward": _of(arms, "rewards", head),
        "seconds a response": lambda arm: f"{arms[arm]['response_s']:.2f}",
        f"*{both}* over it": lambda arm: signed(over[arm]) if arm in over else "",
        "value at the end": _of(arms, "values", head),
    }
    return [
        f"**Search** for `{head}`. These take as many rows of each step: {', '.join(others)} and {both}.",
        _table(part["arms"], columns | _costs(arms)),
    ]


def _of(arms: Mapping[str, Any], what: str, head: str) -> Cell:
    return lambda arm: interval(arms[arm][what][head])


def _costs(arms: Mapping[str, Any]) -> dict[str, Cell]:
    def mean(metric: str) -> Cell:
        return lambda arm: f"{arms[arm][metric]['mean']:.2f}"

    return {TITLES[metric]: mean(metric) for metric in _COSTS}


def _table(arms: Sequence[str] | Mapping[str, Any], columns: Mapping[str, Cell]) -> str:
    lines = header(["", *columns])
    return "\n".join([*lines, *(row([name, *(cell(name) for cell in columns.values())]) for name in arms)])
