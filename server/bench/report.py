"""The benchmark's JSON as Markdown: a section for each table, with what was and what was not measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from server.bench.peers import ARMS, BESIDE_VLLM, OURS, VLLM, VLLM_WITHOUT_HEADS
from server.bench.soak.table import soak_table

_GIB = 2**30


def sections(result: Mapping[str, Any]) -> dict[str, str]:
    """Bodies by the name of the page's section. What compares peers with ours comes all together, so that a page never
    shows two runs at once; looks into our own engine, and at control inside vLLM, come if they were measured. A GPU's
    sections have names of their own, so that a page can show a CPU beside it."""
    bodies: dict[str, str] = {}
    own = {"step": step_table(result), "quantization": quantization_table(result), "vllm": vllm_table(result)}
    is_of_vllm_alone = bool(own["vllm"]) and OURS not in result["offline"]
    if (result.get("offline") is not None or result.get("online") is not None) and not is_of_vllm_alone:
        tables = {"offline": offline_table, "online": online_table, "start": start_table, "notes": notes}
        bodies = {name: table(result) or f"({name}: not measured)" for name, table in tables.items()}
    bodies |= {name: f"{body}\n\n{_where(result)}" for name, body in own.items() if body}
    if body := soak_table(result):
        bodies["soak"] = body
    prefix = "bench-gpu" if result["settings"]["device"] == "cuda" else "bench"
    return {f"{prefix}-{name}": body for name, body in bodies.items()}


def offline_table(result: Mapping[str, Any]) -> str:
    """New tokens a second at each batch size; beside a peer's, ours over it."""
    arms = result.get("offline")
    if not arms:
        return ""
    sizes = [str(size) for size in result["settings"]["batch_sizes"]]
    lines = _head(["new tokens a second", *(f"batch {size}" for size in sizes)])
    for arm, figures in arms.items():
        cells = []
        for size in sizes:
            mine = figures["batches"].get(size)
            cells.append(_rate_cell(mine["tokens_per_s"], _ours(arms, arm, "batches", size)) if mine else _MISSING)
        lines.append(_row([_name(arm, result), *cells]))
    return "\n".join(lines)


def online_table(result: Mapping[str, Any]) -> str:
    """Medians over repeats of each turn's percentiles; ours / peer is of tokens a second, first text and gap."""
    arms = result.get("online")
    if not arms:
        return ""
    settings = result["settings"]
    good = f"goodput (TTFT <= {settings['ttft_objective_ms']:g} ms, ITL <= {settings['itl_objective_ms']:g} ms)"
    titles = ["requests a second", "", "TTFT, ms", "ITL, ms", "whole answer, s", "tokens a second", good, "failed"]
    lines = _head([*titles, "ours / peer: tokens, TTFT, ITL"])
    for rate in (f"{rate:g}" for rate in settings["rates"]):
        for arm, figures in arms.items():
            turn = figures["rates"].get(rate)
            if turn is None:
                lines.append(_row([rate, _name(arm, result), *[_MISSING] * 7]))
                continue
            failed = sum(repeat["num_failed"] for repeat in turn["repeats"])
            cells = [_times(turn["ttft_s"], 1000), _times(turn["itl_s"], 1000), _times(turn["e2e_s"], 1)]
            tokens = f"{turn['tokens_per_s']['median']:.0f}" if turn["tokens_per_s"] else _MISSING
            cells += [tokens, f"{100 * turn['goodput']['median']:.0f}%", str(failed)]
            lines.append(
                _row([rate, _name(arm, result), *cells, _online_ratios(turn, _ours(arms, arm, "rates", rate))])
            )
    return "\n".join(lines)


def start_table(result: Mapping[str, Any]) -> str:
    """By peer: seconds until the first answer, and the most memory it held."""
    kinds = [kind for kind in ("offline", "online") if result.get(kind)]
    if not kinds:
        return ""
    names = {"offline": "engine", "online": "server"}
    titles = [f"{names[kind]}: {what}" for kind in kinds for what in ("ready after, s", "peak memory, GiB")]
    lines = _head(["", *titles])
    arms = dict.fromkeys(arm for kind in kinds for arm in result[kind])
    for arm in arms:
        if arm in ARMS and ARMS[arm].num_heads:
            continue  # the same process
        cells = []
        for kind in kinds:
            figures = result[kind].get(arm, {})
            start, memory = figures.get("startup_s"), figures.get("peak_rss_bytes")
            cells += [_MISSING if start is None else f"{start:.1f}", _gib(memory)]
        lines.append(_row([_name(arm, result), *cells]))
    return "\n".join(lines)


def step_table(result: Mapping[str, Any]) -> str:
    """Milliseconds of a step's parts, by way of computing it and heads in use."""
    step = result.get("step")
    if not step:
        return ""
    ways = step["parts_ms"]
    parts = list(next(iter(next(iter(ways.values())).values())))
    lines = _head([f"ms of a step of {step['rows']} rows", *parts, "over the step without control"])
    for way, by_heads in ways.items():
        for heads, spent_ms in by_heads.items():
            over = spent_ms["step"] / by_heads[""]["step"]
            name = f"{way}, {heads.replace(',', ' + ') or 'no control'}"
            lines.append(_row([name, *(f"{spent_ms[part]:.1f}" for part in parts), f"{over:.3f}"]))
    return "\n".join(lines)


def quantization_table(result: Mapping[str, Any]) -> str:
    losses = result.get("quantization")
    if not losses:
        return ""
    lines = _head(["bits", "KL from 16 bits, nats a token", "less likely, nats a token"])
    for bits in ("8", "4"):
        lines.append(_row([bits, f"{losses[bits]['kl_nats']:.4f}", f"{losses[bits]['nll_increase_nats']:+.4f}"]))
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
    lines = _head(["time", *(f"batch {size}, {title}" for size in sizes for title in others.values())])
    for arm in beside:
        cells = [
            _time_ratio(arms[arm], arms.get(other), size) if other == VLLM or ARMS[arm].num_heads else _MISSING
            for size in sizes
            for other in others
        ]
        lines.append(_row([_name(arm, result), *cells]))
    return "\n".join(lines)


def _time_ratio(mine: Mapping[str, Any], other: Mapping[str, Any] | None, size: str) -> str:
    """Of a batch's seconds, by turns."""
    batches = [arm["batches"].get(size) for arm in (mine, other) if arm]
    if len(batches) < 2 or None in batches or len({len(batch["seconds"]) for batch in batches}) > 1:
        return _MISSING
    ratios = [a / b for a, b in zip(*(batch["seconds"] for batch in batches), strict=True)]
    return f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def notes(result: Mapping[str, Any]) -> str:
    """What it was measured on, and what could not be."""
    lines = [f"{_where(result)} In brackets: ours / peer, the median over repeats."]
    lines += [f"Not measured: `{arm}`: {why}." for arm, why in result["skipped"].items()]
    lines += [f"Not measured online: `{arm}` has no server." for arm in result.get("without_server", ())]
    for kind in ("offline", "online"):
        for arm, figures in (result.get(kind) or {}).items():
            if "failed" in figures:
                lines.append(f"Failed {kind}: `{arm}`: {figures['failed'].split(';')[0]}.")
    return "\n\n".join(lines)


def _where(result: Mapping[str, Any]) -> str:
    """The command, what it ran on, and what vLLM was given of what its manual advises for a CPU."""
    system, settings = result["system"], result["settings"]
    where = [system["cpu"], f"{settings['threads']} threads", f"{system['memory_bytes'] / _GIB:.0f} GiB"]
    where += [system["gpu"]] if system["gpu"] else []
    what = [f"{settings['prompt_tokens']} prompt and {settings['new_tokens']} new tokens", settings["dtype"]]
    what += [f"{settings['repeats']} repeats (median, lowest to highest)", f"seed {settings['seed']}"]
    return (
        f"`{result['command']}`, {result['model']}, {', '.join([*what, *where])}, {system['date']}, "
        f"commit {system['commit']}.{_preloaded(result)}"
    )


def _preloaded(result: Mapping[str, Any]) -> str:
    names = (result.get("offline") or {}).get(VLLM, {}).get("facts", {}).get("preloaded")
    return "" if names is None else f" vLLM ran with {' and '.join(names) or 'nothing'} preloaded."


_MISSING = "-"


def _name(arm: str, result: Mapping[str, Any]) -> str:
    version = next(iter(result["versions"].get(arm, {}).values()), None)
    return f"`{arm}` {version}" if version else f"`{arm}`"


def _ours(arms: Mapping[str, Any], arm: str, kind: str, key: str) -> dict[str, Any] | None:
    """Our figures to compare an arm's with: none for our own."""
    return None if arm == OURS else arms.get(OURS, {}).get(kind, {}).get(key)


def _rate_cell(spread: Mapping[str, Any], ours: Mapping[str, Any] | None) -> str:
    text = f"{spread['median']:.0f} ({spread['low']:.0f} to {spread['high']:.0f})"
    return text if ours is None else f"{text} [{_ratio(ours['tokens_per_s']['all'], spread['all'])}]"


def _ratio(ours: Sequence[float | None], peer: Sequence[float | None]) -> str:
    """Of the same repeat, where both have it: what slows the machine slows both."""
    pairs = [mine / theirs for mine, theirs in zip(ours, peer, strict=False) if mine and theirs]
    return f"{median(pairs):.2f}" if pairs else _MISSING


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


def _head(titles: Sequence[str]) -> list[str]:
    return [_row(titles), "|---" * len(titles) + "|"]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
