"""How fast and how dear one GPU serves an 8B model, with and without control, and how many GPUs a load needs.

A roofline: a decoding step takes as long as its memory traffic or its arithmetic, whichever is slower, and control
comes on top. Every constant is in capacity.json with its source; those of control are counted on the editor itself by
tests/deploy/test_capacity.py. Nothing here has been measured on a GPU. Knows nothing of the server; needs only Python.

    python deploy/capacity.py                                print Markdown tables
    python deploy/capacity.py --constants mine.json          {"usd_per_hour": 1.9, ...} instead of the defaults
    python deploy/capacity.py --into deploy/README.md        write them between the page's markers
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULTS = Path(__file__).with_suffix(".json")
BATCH_SIZES = (1, 8, 32, 64, 128, 256)
METHODS = {"none": "no control", "linear": "linear head", "mlp": "two-layer head"}
SECTION = re.compile(r"(?<=<!-- capacity: begin -->\n).*?(?=<!-- capacity: end -->)", re.DOTALL)
Constants = Mapping[str, float]


class ConstantsError(ValueError):
    """Constants that are not named or not numbers as they must be."""


@dataclass(frozen=True, slots=True)
class Service:
    """One GPU at the largest batch that fits, prompts included."""

    batch_size: int
    inter_token_s: float
    tokens_per_s: float
    requests_per_s: float
    usd_per_million_tokens: float
    num_gpus: int


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--constants", type=Path, help="JSON file of names and numbers to use instead of the defaults")
    parser.add_argument("--into", type=Path, help="page whose section is to be written anew")
    arguments = parser.parse_args(argv)
    try:
        given = {} if arguments.constants is None else json.loads(arguments.constants.read_text())
        text = report(constants(given))
        if arguments.into is None:
            print(text)
            return 0
        page = arguments.into.read_text()
        if not SECTION.search(page):
            raise ConstantsError(f"{arguments.into} has no section between <!-- capacity: begin --> and ... end -->")
        arguments.into.write_text(SECTION.sub(lambda _: f"{text}\n", page))
    except (ConstantsError, json.JSONDecodeError, OSError) as error:
        print(f"capacity.py: {error}", file=sys.stderr)
        return 2
    return 0


def constants(given: Mapping[str, Any]) -> dict[str, float]:
    """The defaults of capacity.json with what is given in their place. Raises ConstantsError."""
    known = {name: entry["value"] for name, entry in _defaults().items()}
    if not isinstance(given, Mapping):
        raise ConstantsError("constants must be one JSON object of names and numbers")
    if unknown := sorted(set(given) - set(known)):
        raise ConstantsError(f"unknown constants {', '.join(unknown)}; known: {', '.join(known)}")
    for name, value in given.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        # Only what control adds may be nothing.
        if not is_number or value < 0 or (value == 0 and not name.startswith("control_")):
            raise ConstantsError(f"{name} is {value!r}; it must be a finite number above 0")
    result = known | dict(given)
    if _kv_bytes_free(result) < _kv_bytes_per_token(result) * _sequence_tokens(result):
        raise ConstantsError("the weights leave no room for a single sequence; give more memory or shorter sequences")
    return result


def decode_step_s(c: Constants, *, batch_size: int, method: str = "none") -> float:
    """Seconds of one decoding step in which every row is controlled by `method`.

    max(bytes / bandwidth, FLOPs / rate) of the model, and after it the larger of control's bytes and its launches;
    then what the host and the sampler take. The LM-head products of control go with the model's own, in one product.
    """
    bandwidth, rate = _bandwidth(c), c["flops_per_s"] * c["flops_share"]
    context = c["prompt_tokens"] + c["response_tokens"] / 2
    weights = _decode_parameters(c) * c["bytes_per_weight"]
    head_flops = 2 * c["hidden_size"] * c["vocab_size"]
    attention_flops = 4 * c["num_layers"] * c["num_query_heads"] * c["head_size"] * context
    row_flops = 2 * _decode_parameters(c) + attention_flops
    control_s = 0.0
    if method != "none":
        row_flops += c[f"control_{method}_products"] * head_flops
        control_bytes = c[f"control_{method}_bytes_per_vocab_entry"] * c["vocab_size"] * batch_size
        control_s = max(control_bytes / bandwidth, c[f"control_{method}_kernels"] * c["launch_s"])
    traffic_s = (weights + batch_size * context * _kv_bytes_per_token(c)) / bandwidth
    return max(traffic_s, batch_size * row_flops / rate) + control_s + c["step_overhead_s"]


def prefill_s(c: Constants) -> float:
    """Seconds of GPU time for one prompt: arithmetic only, for many prompts share the weights' traffic."""
    block_parameters = c["num_parameters"] - 2 * c["hidden_size"] * c["vocab_size"]
    attention = 2 * c["num_layers"] * c["num_query_heads"] * c["head_size"] * c["prompt_tokens"] ** 2
    return (2 * block_parameters * c["prompt_tokens"] + attention) / (c["flops_per_s"] * c["flops_share"])


def largest_batch(c: Constants) -> int:
    """As many sequences as fit at their full length, up to the server's limit."""
    return min(int(_kv_bytes_free(c) // (_kv_bytes_per_token(c) * _sequence_tokens(c))), int(c["max_batch_size"]))


def service(c: Constants, *, method: str = "none") -> Service:
    """One GPU that always has a full batch, and the GPUs that the load needs at `load_share` of that."""
    batch_size = largest_batch(c)
    step_s = decode_step_s(c, batch_size=batch_size, method=method)
    request_s = prefill_s(c) + c["response_tokens"] * step_s / batch_size
    tokens_per_s = c["response_tokens"] / request_s
    return Service(
        batch_size=batch_size,
        # A prompt is computed between steps, and each sequence brings one in its lifetime.
        inter_token_s=request_s * batch_size / c["response_tokens"],
        tokens_per_s=tokens_per_s,
        requests_per_s=1 / request_s,
        usd_per_million_tokens=c["usd_per_hour"] / 3600 / (tokens_per_s * c["load_share"]) * 1e6,
        num_gpus=math.ceil(c["requests_per_s"] * request_s / c["load_share"]),
    )


def report(c: Constants) -> str:
    """The tables as Markdown."""
    services = {method: service(c, method=method) for method in METHODS}
    lines = [
        "Tokens/s while decoding (every row controlled, prompts not counted), by sequences at once:",
        "",
        _row(["method", *map(str, BATCH_SIZES)]),
        _row(["---"] * (len(BATCH_SIZES) + 1)),
    ]
    for method, name in METHODS.items():
        cells = [_decoding_cell(c, batch_size, method) for batch_size in BATCH_SIZES]
        lines.append(_row([name, *cells]))
    lines += [
        "",
        f"Serving prompts of {c['prompt_tokens']:,.0f} tokens with responses of {c['response_tokens']:,.0f}, "
        f"{services['none'].batch_size} sequences at once; cost and GPUs at {c['load_share']:.0%} load:",
        "",
        _row(["method", "ms between tokens", "tokens/s a GPU", "requests/s a GPU", "$ a million tokens",
              f"GPUs for {c['requests_per_s']:,.0f} requests/s"]),
        _row(["---"] * 6),
    ]  # fmt: skip
    for method, name in METHODS.items():
        s = services[method]
        lines.append(
            _row([name, f"{s.inter_token_s * 1e3:.1f}", f"{s.tokens_per_s:,.0f}", f"{s.requests_per_s:.1f}",
                  f"{s.usd_per_million_tokens:.3f}", str(s.num_gpus)])
        )  # fmt: skip
    lines += ["", _row(["constant", "value", "source"]), _row(["---"] * 3)]
    lines += [_row([f"`{name}`", _number(c[name]), _source(c, name)]) for name in _defaults()]
    return "\n".join(lines)


def _decoding_cell(c: Constants, batch_size: int, method: str) -> str:
    base_s, step_s = (decode_step_s(c, batch_size=batch_size, method=name) for name in ("none", method))
    rate = f"{batch_size / step_s:,.0f}"
    return rate if method == "none" else f"{rate} (-{1 - base_s / step_s:.0%})"


def _defaults() -> dict[str, dict[str, Any]]:
    return json.loads(DEFAULTS.read_text())


def _source(c: Constants, name: str) -> str:
    entry = _defaults()[name]
    return entry["source"] if entry["value"] == c[name] else "given"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _bandwidth(c: Constants) -> float:
    return c["hbm_bytes_per_s"] * c["bandwidth_share"]


def _decode_parameters(c: Constants) -> float:
    """Those that a step reads: all but the input embedding, of which it reads a row a token."""
    return c["num_parameters"] - c["hidden_size"] * c["vocab_size"]


def _kv_bytes_per_token(c: Constants) -> float:
    return 2 * c["num_layers"] * c["num_kv_heads"] * c["head_size"] * c["bytes_per_weight"]


def _kv_bytes_free(c: Constants) -> float:
    return c["memory_bytes"] * c["memory_share"] - c["num_parameters"] * c["bytes_per_weight"]


def _sequence_tokens(c: Constants) -> float:
    return c["prompt_tokens"] + c["response_tokens"]


if __name__ == "__main__":
    sys.exit(main())
