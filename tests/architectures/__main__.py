"""`python -m tests.architectures`: judge a tiny model of every architecture, and write docs/architectures.{json,md}.

Each case runs in a process of its own, forked from this one, with limits on time and memory. What is judged already by
this very code is not judged again, so that a run goes on where it was stopped. Exit status 1 when any case is a fault.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import time
from pathlib import Path

import transformers

from tests.architectures.models import case_named, cases
from tests.architectures.processes import judged
from tests.architectures.table import read_json, render, write_json
from tests.architectures.verdict import Verdict

_ROOT = Path(__file__).parents[2]
_DOCS = _ROOT / "docs"
_KEPT = _ROOT / ".architectures.jsonl"
_TELLING = ("__main__.py", "table.py", "test_table.py")
"""Of these files, what only writes verdicts down."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.architectures", description=__doc__)
    parser.add_argument(
        "names", nargs="*", help="cases such as mistral or phi3+longrope, printed and not kept; else all"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many processes at once")
    parser.add_argument("--brief", action="store_true", help="judge the named cases briefly")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="stop after so many; what is not judged by then is left out"
    )
    parser.add_argument("--json", action="store_true", help="print a line of JSON a case")
    options = parser.parse_args()
    if "OMP_NUM_THREADS" not in os.environ:
        # Of the processes, not of each.
        os.environ["OMP_NUM_THREADS"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "tests.architectures", *sys.argv[1:]])
    try:
        wanted = [case_named(name) for name in options.names] or cases()
    except ValueError as error:
        parser.error(f"names: {error}")
    started_s, code = time.monotonic(), _code()
    kept = {} if options.names else _kept(code)
    verdicts = {case.name: kept[case.name] for case in wanted if case.name in kept}
    with open(os.devnull if options.names else _KEPT, "a") as file:
        # Every architecture first, then the variants.
        missing = sorted((case for case in wanted if case.name not in verdicts), key=lambda case: case.variant != "")
        for verdict in judged(missing, options.jobs, is_brief=options.brief and bool(options.names)):
            verdicts[verdict.name] = verdict
            file.write(json.dumps({"code": code, **verdict.to_json()}) + "\n")
            file.flush()
            if options.names or verdict.is_fault:
                print(json.dumps(verdict.to_json()) if options.json else verdict, flush=True)
            if time.monotonic() - started_s > 60 * options.minutes:
                break
    judged_cases = [verdicts[case.name] for case in wanted if case.name in verdicts]
    found = [verdict for verdict in judged_cases if verdict.is_applicable]
    if not options.names:
        write_json(found, _DOCS / "architectures.json", num_left_out=len(wanted) - len(judged_cases))
        (_DOCS / "architectures.md").write_text(render(*read_json(_DOCS / "architectures.json")))
    faults = sum(verdict.is_fault for verdict in found)
    print(f"{len(found)} cases in {time.monotonic() - started_s:.0f} s, {faults} faults", file=sys.stderr)
    return int(faults > 0)


def _kept(code: str) -> dict[str, Verdict]:
    """Verdicts of an earlier run of the same code."""
    if not _KEPT.exists():
        return {}
    rows = [json.loads(line) for line in _KEPT.read_text().splitlines()]
    return {row["name"]: Verdict.from_json(row) for row in rows if row.pop("code") == code}


def _code() -> str:
    """A digest of what a verdict depends on."""
    digest = hashlib.sha256(transformers.__version__.encode())
    for folder in (*(_ROOT / "server" / name for name in ("control", "engines", "kernels")), Path(__file__).parent):
        for path in sorted(path for kind in ("*.py", "*.cpp", "*.h") for path in folder.rglob(kind)):
            if path.name not in _TELLING or path.parent != Path(__file__).parent:
                digest.update(path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
