"""`python -m benchmarks.edit`: launches of an edit and a draw, counted anywhere, and times of edits on a device."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.edit import draws, launches, times
from benchmarks.edit.cases import Shape
from benchmarks.markdown import header, replace_sections, row
from benchmarks.speed.system import facts
from server.kernels import VARIABLE
from value_models.files import write_text

SECTION = "bench-edit-launches"


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    args = parser.parse_args(given)
    if args.time and not importlib.util.find_spec("triton"):
        parser.error("--time: the package triton is not installed here; without it launches alone are counted")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = [Shape(rows, args.hidden, args.vocabulary) for rows in args.rows]
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.edit", *given]),
        "settings": {"rows": args.rows, "hidden": args.hidden, "vocabulary": args.vocabulary, "repeats": args.repeats},
        "system": facts(),
        "launches": _counted(shapes[-1]),
        "draws": draws.count(shapes[-1].rows, shapes[-1].vocabulary),
    }
    if args.time:
        result["times"] = times.measure(shapes, device, repeats=args.repeats)
    write_text(args.out, json.dumps(result, indent=1) + "\n")
    print(table(result))
    if args.into is not None:
        replace_sections(args.into, {SECTION: table(result)})


def table(result: Mapping[str, Any]) -> str:
    """Launches of edits and of draws by case, and the command that counted them."""
    ways = ["torch's operations", "with the kernels"]
    lines = header(["launches beyond those of a step without control", *ways])
    lines += [row(cells) for cells in launches.table_rows(result["launches"])]
    lines += ["", *header(["launches and copies of a draw", *ways])]
    lines += [row(cells) for cells in launches.table_rows(result["draws"])]
    return "\n".join([*lines, "", f"`{result['command']}`, {result['system']['date'][:10]}."])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.edit", description=__doc__)
    parser.add_argument("--rows", type=_sizes, default=[1, 32, 256], help="comma-separated; launches are of the last")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--time", action="store_true", help="measure times too, on a GPU or by Triton's interpreter")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--into", type=Path, help=f"page with a section {SECTION}")
    return parser


def _sizes(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _counted(shape: Shape) -> dict[str, Any]:
    """Tensors without values are edited by the kernels where these are asked for by name."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "triton"
    try:
        return launches.count(shape)
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
