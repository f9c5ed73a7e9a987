"""The benchmark's JSON as Markdown: a section for each table, with what was and what was not measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.speed.peers import OURS, VLLM
from benchmarks.speed.tables import (
    long_table,
    neighbours_table,
    offline_table,
    online_table,
    quantization_table,
    reason,
    start_table,
    step_table,
    vllm_table,
)

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
        compared = {"offline": offline_table, "online": online_table, "start": start_table, "notes": notes}
        bodies = {name: table(result) or f"({name}: not measured)" for name, table in compared.items()}
    bodies |= {name: f"{body}\n\n{_where(result)}" for name, body in own.items() if body}
    return named(bodies, result)


def named(bodies: Mapping[str, str], result: Mapping[str, Any]) -> dict[str, str]:
    """By the names that a page's sections have."""
    prefix = section_prefix(result["settings"].get("label"), result["settings"]["device"])
    return {f"{prefix}-{name}": body for name, body in bodies.items()}


def section_prefix(label: str | None, device: str) -> str:
    label = label or ("gpu" if device == "cuda" else None)
    return f"bench-{label}" if label else "bench"


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
