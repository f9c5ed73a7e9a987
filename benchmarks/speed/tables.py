"""The benchmark's tables in Markdown, one function for each; empty where there was nothing to measure.

An arm's row compares its figures with ours of the same turns. Enter at the functions called `..._table`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.markdown import header, row
from benchmarks.speed.long_prompts import NUM_AHEAD, NUM_STREAMS
from benchmarks.speed.neighbours import ALONE, BUSY, TWO
from benchmarks.speed.peers import ARMS, BESIDE_VLLM, OURS, VLLM, VLLM_WITHOUT_HEADS

_GIB = 2**30
_MISSING = "-"


def offline_table(result: Mapping[str, Any]) -> str:
    """New tokens a second at each batch size; beside a peer's, ours over it."""
    arms = result.get("offline")
    if not arms:
        return ""
    sizes = [str(size) for size in result["settings"]["batch_sizes"]]
    lines = header(["new tokens a second", *(f"batch {size}" for size in sizes)])
    for arm, figures in arms.items():
        cells = []
        for size in sizes:
            mine = figures["batches"].get(size)
            cells.append(_rate_cell(mine["tokens_per_s"], _our_figures(arms, arm, "batches", size)) if mine else None)
        lines.append(_arm_row([_arm_name(arm, result)], cells, figures))
    return "\n".join(lines)


def online_table(result: Mapping[str, Any]) -> str:
    """Medians over repeats of each turn's percentiles; ours / peer is of tokens a second, first text and gap."""
    arms = result.get("online")
    if not arms:
        return ""
    settings = result["settings"]
    good = f"goodput (TTFT <= {settings['ttft_objective_ms']:g} ms, ITL <= {settings['itl_objective_ms']:g} ms)"
    titles = ["requests a second", "", "TTFT, ms", "ITL, ms", "whole answer, s", "tokens a second", good, "failed"]
    lines = header([*titles, "ours / peer: tokens, TTFT, ITL"])
    for rate in (f"{rate:g}" for rate in settings["rates"]):
        for arm, figures in arms.items():
            turn = figures["rates"].get(rate)
            if turn is None:
                lines.append(_arm_row([rate, _arm_name(arm, result)], [None] * 7, figures))
                continue
            failed = sum(repeat["num_failed"] for repeat in turn["repeats"])
            cells = [_times(turn["ttft_s"], 1000), _times(turn["itl_s"], 1000), _times(turn["e2e_s"], 1)]
            tokens = f"{turn['tokens_per_s']['median']:.0f}" if turn["tokens_per_s"] else _MISSING
            cells += [tokens, f"{100 * turn['goodput']['median']:.0f}%", str(failed)]
            cells.append(_online_ratios(turn, _our_figures(arms, arm, "rates", rate)))
            lines.append(row([rate, _arm_name(arm, result), *cells]))
    return "\n".join(lines)


def start_table(result: Mapping[str, Any]) -> str:
    """By peer: seconds until the first answer, and the most memory it held."""
    kinds = [kind for kind in ("offline", "online") if result.get(kind)]
    if not kinds:
        return ""
    names = {"offline": "engine", "online": "server"}
    titles = [f"{names[kind]}: {what}" for kind in kinds for what in ("ready after, s", "peak memory, GiB")]
    lines = header(["", *titles])
    arms = dict.fromkeys(arm for kind in kinds for arm in result[kind])
    for arm in arms:
        if arm in ARMS and ARMS[arm].num_heads:
            continue  # the same process
        cells = []
        for kind in kinds:
            figures = result[kind].get(arm, {})
            start, memory = figures.get("startup_s"), figures.get("peak_rss_bytes")
            cells += [_MISSING if start is None else f"{start:.1f}", _gib(memory)]
        lines.append(row([_arm_name(arm, result), *cells]))
    return "\n".join(lines)


def step_table(result: Mapping[str, Any]) -> str:
    """Milliseconds of a step's parts, by way of computing it and heads in use."""
    step = result.get("step")
    if not step:
        return ""
    if "failed" in step:
        return f"(failed: {reason(step)})"
    ways = step["parts_ms"]
    parts = list(next(iter(next(iter(ways.values())).values())))
    lines = header([f"ms of a step of {step['rows']} rows", *parts, "over the step without control"])
    for way, by_heads in ways.items():
        for heads, spent_ms in by_heads.items():
            over = spent_ms["step"] / by_heads[""]["step"]
            title = f"{way}, {heads.replace(',', ' + ') or 'no control'}"
            lines.append(row([title, *(f"{spent_ms[part]:.1f}" for part in parts), f"{over:.3f}"]))
    return "\n".join(lines)


def quantization_table(result: Mapping[str, Any]) -> str:
    losses = result.get("quantization")
    if not losses:
        return ""
    if "failed" in losses:
        return f"(failed: {reason(losses)})"
    lines = header(["bits", "KL from 16 bits, nats a token", "less likely, nats a token"])
    for bits in ("8", "4"):
        lines.append(row([bits, f"{losses[bits]['kl_nats']:.4f}", f"{losses[bits]['nll_increase_nats']:+.4f}"]))
    return "\n".join(lines)


def vllm_table(result: Mapping[str, Any]) -> str:
    """A batch's time with control inside vLLM over that of vLLM without it, by turns of the same run.

    Once over plain vLLM, in a process of its own, and once over the very process that controls, while it does not: two
    processes of the same program can differ by some percent throughout, as a second one of plain vLLM shows.
    """
    arms = result.get("offline") or {}
    beside = [arm for arm in arms if arm in BESIDE_VLLM]
    if VLLM not in arms or not beside:
        return ""
    sizes = [str(size) for size in result["settings"]["batch_sizes"]]
    others = {VLLM: "over plain vLLM", VLLM_WITHOUT_HEADS: "over the same process without control"}
    lines = header(["time", *(f"batch {size}, {title}" for size in sizes for title in others.values())])
    for arm in beside:
        cells = [
            _time_ratio(arms[arm], arms.get(other), size) if other == VLLM or ARMS[arm].num_heads else _MISSING
            for size in sizes
            for other in others
        ]
        lines.append(row([_arm_name(arm, result), *cells]))
    return "\n".join(lines)


def _time_ratio(mine: Mapping[str, Any], other: Mapping[str, Any] | None, size: str) -> str:
    """Of a batch's seconds, by turns."""
    batches = [arm["batches"].get(size) for arm in (mine, other) if arm]
    if len(batches) < 2 or None in batches or len({len(batch["seconds"]) for batch in batches}) > 1:
        return _MISSING
    ratios = [a / b for a, b in zip(*(batch["seconds"] for batch in batches), strict=True)]
    return f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


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
    lines = header([*titles, "two at once, together", "over one alone"])
    for arm, figures in arms.items():
        conditions = figures["conditions"]
        cells = [_condition(arms, arm, ALONE)]
        for condition in (BUSY, TWO):
            cells += [_condition(arms, arm, condition), None]
            if condition in conditions:
                rates = [conditions[one]["tokens_per_s"]["all"] for one in (condition, ALONE)]
                cells[-1] = _ratio(*rates)
        lines.append(_arm_row([_arm_name(arm, result)], cells, figures))
    return "\n".join(lines)


def _alone_table(result: Mapping[str, Any], arms: Mapping[str, Any], lengths: list[str]) -> str:
    titles = [title for length in lengths for title in (f"{length} tokens: first token, s", "prompt tokens a second")]
    lines = header(["long prompts, alone", *titles, f"a token's cost, {lengths[-1]} over {lengths[0]}"])
    for arm, figures in arms.items():
        measured = figures["lengths"]
        cells: list[str | None] = []
        for length in lengths:
            if length in measured:
                one = measured[length]
                ours = _our_figures(arms, arm, "lengths", length)
                cells += [f"{one['ttft_s']['median']:.2f}", _rate_cell(one["tokens_per_s"], ours)]
            else:
                cells += [None, None]
        ends = [measured[length]["tokens_per_s"]["all"] for length in (lengths[0], lengths[-1]) if length in measured]
        cells.append(_ratio(*ends) if len(ends) == 2 else None)
        lines.append(_arm_row([_arm_name(arm, result)], cells, figures))
    return "\n".join(lines)


def _beside_table(result: Mapping[str, Any], arms: Mapping[str, Any], lengths: list[str]) -> str:
    titles = [
        title
        for length in lengths
        for title in (f"{length} tokens: longest gap / usual, ms", "ratio", f"short behind {NUM_AHEAD}, s (alone)")
    ]
    lines = header([f"beside {NUM_STREAMS} streams", *titles])
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
        lines.append(_arm_row([_arm_name(arm, result)], cells, figures))
    return "\n".join(lines)


def _condition(arms: Mapping[str, Any], arm: str, condition: str) -> str | None:
    figures = arms[arm]["conditions"].get(condition)
    return figures and _rate_cell(figures["tokens_per_s"], _our_figures(arms, arm, "conditions", condition))


def _online_ratios(turn: Mapping[str, Any], ours: Mapping[str, Any] | None) -> str:
    """Of tokens a second, and of the median first text and gap."""
    if ours is None:
        return ""
    both = (ours["repeats"], turn["repeats"])
    tokens = _ratio(*([repeat["tokens_per_s"] for repeat in repeats] for repeats in both))
    times = [
        _ratio(*([(repeat[name] or {}).get("p50") for repeat in repeats] for repeats in both))
        for name in ("ttft_s", "itl_s")
    ]
    return ", ".join([tokens, *times])


def _times(percentiles: Mapping[str, Any] | None, scale: float) -> str:
    """p50 / p95 / p99."""
    if percentiles is None:
        return _MISSING
    digits = 0 if scale > 1 else 2
    return " / ".join(f"{scale * spread['median']:.{digits}f}" for spread in percentiles.values())


def _gib(count: int | None) -> str:
    return _MISSING if count is None else f"{count / _GIB:.2f}"


def _arm_row(first: Sequence[str], cells: Sequence[str | None], figures: Mapping[str, Any]) -> str:
    """A row of an arm's cells. Where one is None, the arm has failed, and says why once, or was not measured."""
    reasons = iter([f"failed: {reason(figures)}"] if "failed" in figures else ())
    others = "failed" if "failed" in figures else _MISSING
    return row([*first, *(next(reasons, others) if cell is None else cell for cell in cells)])


def reason(figures: Mapping[str, Any]) -> str:
    """Why an arm failed, without the end of its log."""
    return figures["failed"].split(";")[0].replace("|", "/").replace("\n", " ")


def _arm_name(arm: str, result: Mapping[str, Any]) -> str:
    version = next(iter(result["versions"].get(arm, {}).values()), None)
    return f"`{arm}` {version}" if version else f"`{arm}`"


def _our_figures(arms: Mapping[str, Any], arm: str, kind: str, key: str) -> dict[str, Any] | None:
    """Our figures to compare an arm's with: none for our own."""
    return None if arm == OURS else arms.get(OURS, {}).get(kind, {}).get(key)


def _rate_cell(spread: Mapping[str, Any], mine: Mapping[str, Any] | None) -> str:
    """Tokens a second, their lowest and highest, and ours over them."""
    text = f"{spread['median']:.0f} ({spread['low']:.0f} to {spread['high']:.0f})"
    return text if mine is None else f"{text} [{_ratio(mine['tokens_per_s']['all'], spread['all'])}]"


def _ratio(mine: Sequence[float | None], theirs: Sequence[float | None]) -> str:
    """Of the same repeat, where both have it: what slows the machine slows both."""
    pairs = [a / b for a, b in zip(mine, theirs, strict=False) if a and b]
    return f"{median(pairs):.2f}" if pairs else _MISSING
