"""The benchmark's JSON as Markdown: a section for each table, with what was and what was not measured."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from benchmarks.speed.cells import MISSING, arm_name, arm_row, head, our_figures, rate_cell, ratio, reason, row
from benchmarks.speed.contention_report import long_table, neighbours_table
from benchmarks.speed.peers import ARMS, BESIDE_VLLM, OURS, VLLM, VLLM_WITHOUT_HEADS
from tests.soak.table import soak_table

_GIB = 2**30
_ARITHMETIC = {
    "amx_bf16": "AMX",
    "avx512_bf16": "AVX-512 and bf16",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
}


def sections(result: Mapping[str, Any]) -> dict[str, str]:
    """Bodies by the name of the page's section. What compares peers with ours comes all together, so that a page never
    shows two runs at once; looks into our own engine, at control inside vLLM, at long prompts and at neighbours come if
    they were measured. A run with a label, and a GPU's, have sections of their own names, so that a page can show
    several machines."""
    bodies: dict[str, str] = {}
    own = {"step": step_table(result), "quantization": quantization_table(result), "vllm": vllm_table(result)}
    own |= {
        "long": _with_skipped(long_table(result), result),
        "neighbours": _with_skipped(neighbours_table(result), result),
    }
    is_of_vllm_alone = bool(own["vllm"]) and OURS not in result["offline"]
    if (result.get("offline") is not None or result.get("online") is not None) and not is_of_vllm_alone:
        tables = {"offline": offline_table, "online": online_table, "start": start_table, "notes": notes}
        bodies = {name: table(result) or f"({name}: not measured)" for name, table in tables.items()}
    bodies |= {name: f"{body}\n\n{_where(result)}" for name, body in own.items() if body}
    if body := soak_table(result):
        bodies["soak"] = body
    prefix = section_prefix(result["settings"].get("label"), result["settings"]["device"])
    return {f"{prefix}-{name}": body for name, body in bodies.items()}


def section_prefix(label: str | None, device: str) -> str:
    label = label or ("gpu" if device == "cuda" else None)
    return f"bench-{label}" if label else "bench"


def offline_table(result: Mapping[str, Any]) -> str:
    """New tokens a second at each batch size; beside a peer's, ours over it."""
    arms = result.get("offline")
    if not arms:
        return ""
    sizes = [str(size) for size in result["settings"]["batch_sizes"]]
    lines = head(["new tokens a second", *(f"batch {size}" for size in sizes)])
    for arm, figures in arms.items():
        cells = []
        for size in sizes:
            mine = figures["batches"].get(size)
            cells.append(rate_cell(mine["tokens_per_s"], our_figures(arms, arm, "batches", size)) if mine else None)
        lines.append(arm_row([arm_name(arm, result)], cells, figures))
    return "\n".join(lines)


def online_table(result: Mapping[str, Any]) -> str:
    """Medians over repeats of each turn's percentiles; ours / peer is of tokens a second, first text and gap."""
    arms = result.get("online")
    if not arms:
        return ""
    settings = result["settings"]
    good = f"goodput (TTFT <= {settings['ttft_objective_ms']:g} ms, ITL <= {settings['itl_objective_ms']:g} ms)"
    titles = ["requests a second", "", "TTFT, ms", "ITL, ms", "whole answer, s", "tokens a second", good, "failed"]
    lines = head([*titles, "ours / peer: tokens, TTFT, ITL"])
    for rate in (f"{rate:g}" for rate in settings["rates"]):
        for arm, figures in arms.items():
            turn = figures["rates"].get(rate)
            if turn is None:
                lines.append(arm_row([rate, arm_name(arm, result)], [None] * 7, figures))
                continue
            failed = sum(repeat["num_failed"] for repeat in turn["repeats"])
            cells = [_times(turn["ttft_s"], 1000), _times(turn["itl_s"], 1000), _times(turn["e2e_s"], 1)]
            tokens = f"{turn['tokens_per_s']['median']:.0f}" if turn["tokens_per_s"] else MISSING
            cells += [tokens, f"{100 * turn['goodput']['median']:.0f}%", str(failed)]
            lines.append(
                row([rate, arm_name(arm, result), *cells, _online_ratios(turn, our_figures(arms, arm, "rates", rate))])
            )
    return "\n".join(lines)


def start_table(result: Mapping[str, Any]) -> str:
    """By peer: seconds until the first answer, and the most memory it held."""
    kinds = [kind for kind in ("offline", "online") if result.get(kind)]
    if not kinds:
        return ""
    names = {"offline": "engine", "online": "server"}
    titles = [f"{names[kind]}: {what}" for kind in kinds for what in ("ready after, s", "peak memory, GiB")]
    lines = head(["", *titles])
    arms = dict.fromkeys(arm for kind in kinds for arm in result[kind])
    for arm in arms:
        if arm in ARMS and ARMS[arm].num_heads:
            continue  # the same process
        cells = []
        for kind in kinds:
            figures = result[kind].get(arm, {})
            start, memory = figures.get("startup_s"), figures.get("peak_rss_bytes")
            cells += [MISSING if start is None else f"{start:.1f}", _gib(memory)]
        lines.append(row([arm_name(arm, result), *cells]))
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
    lines = head([f"ms of a step of {step['rows']} rows", *parts, "over the step without control"])
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
    lines = head(["bits", "KL from 16 bits, nats a token", "less likely, nats a token"])
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
    lines = head(["time", *(f"batch {size}, {title}" for size in sizes for title in others.values())])
    for arm in beside:
        cells = [
            _time_ratio(arms[arm], arms.get(other), size) if other == VLLM or ARMS[arm].num_heads else MISSING
            for size in sizes
            for other in others
        ]
        lines.append(row([arm_name(arm, result), *cells]))
    return "\n".join(lines)


def _time_ratio(mine: Mapping[str, Any], other: Mapping[str, Any] | None, size: str) -> str:
    """Of a batch's seconds, by turns."""
    batches = [arm["batches"].get(size) for arm in (mine, other) if arm]
    if len(batches) < 2 or None in batches or len({len(batch["seconds"]) for batch in batches}) > 1:
        return MISSING
    ratios = [a / b for a, b in zip(*(batch["seconds"] for batch in batches), strict=True)]
    return f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def notes(result: Mapping[str, Any]) -> str:
    """What it was measured on, and what could not be."""
    lines = [f"{_where(result)} In brackets: ours / peer, the median over repeats."]
    lines += _skipped(result)
    lines += [f"Not measured online: `{arm}` has no server." for arm in result.get("without_server", ())]
    for kind in ("offline", "online"):
        for arm, figures in (result.get(kind) or {}).items():
            if "failed" in figures:
                lines.append(f"Failed {kind}: `{arm}`: {reason(figures)}.")
    return "\n\n".join(lines)


def _skipped(result: Mapping[str, Any]) -> list[str]:
    return [f"Not measured: `{arm}`: {why}." for arm, why in result["skipped"].items()]


def _with_skipped(body: str, result: Mapping[str, Any]) -> str:
    """A table of arms, if there is one, and which are not in it."""
    return "\n\n".join([body, *_skipped(result)]) if body else ""


def _where(result: Mapping[str, Any]) -> str:
    """The command, what it ran on, and what vLLM was given of what its manual advises for a CPU."""
    system, settings = result["system"], result["settings"]
    where = [_cpu(system), f"{settings['threads']} threads", f"{system['memory_bytes'] / _GIB:.0f} GiB"]
    where += [system["gpu"]] if system["gpu"] else []
    what = [f"{settings['prompt_tokens']} prompt and {settings['new_tokens']} new tokens", settings["dtype"]]
    what += [f"{settings['repeats']} repeats (median, lowest to highest)", f"seed {settings['seed']}"]
    return (
        f"`{result['command']}`, {result['model']}, {', '.join([*what, *where])}, {system['date']}, "
        f"commit {system['commit']}.{_preloaded(result)}"
    )


def _cpu(system: Mapping[str, Any]) -> str:
    """Its model, and the widest arithmetic that it has: models of one name differ in that."""
    flags = system.get("cpu_flags", ())
    widest = next((title for flag, title in _ARITHMETIC.items() if flag in flags), None)
    return f"{system['cpu']} with {widest}" if widest else system["cpu"]


def _preloaded(result: Mapping[str, Any]) -> str:
    names = (result.get("offline") or {}).get(VLLM, {}).get("facts", {}).get("preloaded")
    return "" if names is None else f" vLLM ran with {' and '.join(names) or 'nothing'} preloaded."


def _online_ratios(turn: Mapping[str, Any], ours: Mapping[str, Any] | None) -> str:
    """Of tokens a second, and of the median first text and gap."""
    if ours is None:
        return ""
    both = (ours["repeats"], turn["repeats"])
    tokens = ratio(*([repeat["tokens_per_s"] for repeat in repeats] for repeats in both))
    times = [
        ratio(*([(repeat[name] or {}).get("p50") for repeat in repeats] for repeats in both))
        for name in ("ttft_s", "itl_s")
    ]
    return ", ".join([tokens, *times])


def _times(percentiles: Mapping[str, Any] | None, scale: float) -> str:
    """p50 / p95 / p99."""
    if percentiles is None:
        return MISSING
    digits = 0 if scale > 1 else 2
    return " / ".join(f"{scale * spread['median']:.{digits}f}" for spread in percentiles.values())


def _gib(count: int | None) -> str:
    return MISSING if count is None else f"{count / _GIB:.2f}"
