"""docs/architectures.md, rendered from the JSON that `python -m tests.architectures` writes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.architectures.judge import FLOAT32_NATS, FLOOR_MAX, FLOOR_MEAN, NOISE_MAX, NOISE_MEAN, Served
from tests.architectures.sizes import MAX_POSITIONS
from tests.architectures.verdict import Verdict

_LONGEST_REASON = 150
_OUTCOMES = {
    "fast": "served fast",
    "general": "served generally",
    "refused": "refused",
    "unbuildable": "not built by transformers",
    "fault": "fault",
}


def write_json(verdicts: list[Verdict], path: Path, *, num_left_out: int) -> None:
    """One line a case; of some that there are nothing may be known."""
    path.parent.mkdir(exist_ok=True)
    head = {"transformers": transformers.__version__, "torch": torch.__version__, "num_left_out": num_left_out}
    rows = ",\n".join(json.dumps(verdict.to_json()) for verdict in verdicts)
    path.write_text(f'{json.dumps(head)[:-1]}, "cases": [\n{rows}\n]}}\n')


def read_json(path: Path) -> tuple[dict[str, Any], list[Verdict]]:
    """The versions, and the verdicts."""
    data = json.loads(path.read_text())
    return data, [Verdict.from_json(row) for row in data.pop("cases")]


def render(head: dict[str, Any], verdicts: list[Verdict]) -> str:
    by_type: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        by_type.setdefault(verdict.model_type, []).append(verdict)
    counts = Counter(found[0].outcome for found in by_type.values())
    cases = Counter(verdict.outcome for verdict in verdicts)
    rows = "\n".join(_row(found) for found in by_type.values())
    return f"""# Architectures

Every causal language model class that transformers maps, as a tiny random model, and what becomes of it here. Rendered
by `make architectures` (an hour or less on two cores) from `architectures.json`; transformers
{head["transformers"]}, torch {head["torch"]}, CPU.

Each model has traits that matter: windows and chunks of 16 tokens, biases, soft caps, multipliers, sinks, experts of
which two in four are taken, untied embeddings. It is saved and loaded as a user's folder is, and five texts of 5 to 230
tokens run through the engine: alone, beside each other, in chunks of several sizes, from the prefix cache, and
preempted. All of these must give the same log-probabilities to the bit. They must be those of transformers' own forward
(eager attention, no cache, one text alone): in float32 within {FLOAT32_NATS:g} nats everywhere; in bfloat16 within
{NOISE_MEAN:g} times the mean deviation that bfloat16 makes in transformers itself plus {FLOOR_MEAN:g}, and
{NOISE_MAX:g} times the largest plus {FLOOR_MAX:g} (of models with experts, which another rounding sends elsewhere, all
but one in fifty). Or the model is refused when it is loaded, in one line. Anything else is a fault.

Architectures, and cases: their variants, which are the class as it comes, each type of rotation, and some more. Of
rotations less is judged: texts together and one alone, and in bfloat16 only what the native layers take.
{_left_out(head["num_left_out"])}
| | {" | ".join(_OUTCOMES.values())} | all |
|---|{"---|" * len(_OUTCOMES)}---|
| architectures | {" | ".join(str(counts[outcome]) for outcome in _OUTCOMES)} | {len(by_type)} |
| cases | {" | ".join(str(cases[outcome]) for outcome in _OUTCOMES)} | {len(verdicts)} |

"Fast" is by the native layers, "generally" by transformers' modules with this engine's attention and cache; both with
the traits above, in bfloat16. Deviations are the largest in nats: float32, then bfloat16 and in brackets transformers'
own in bfloat16.

| architecture | class | here | deviation | why, and variants that differ |
|---|---|---|---|---|
{rows}
"""


def _left_out(count: int) -> str:
    return f"In this run there was no time for {count} of the variants, of which nothing is known.\n" if count else ""


def _row(found: list[Verdict]) -> str:
    base, others = found[0], found[1:]
    remarks = [_remark(base)] if _remark(base) else []
    different: dict[tuple[str, str], list[str]] = {}
    for verdict in others:
        if (key := (_OUTCOMES[verdict.outcome], _remark(verdict))) != (_OUTCOMES[base.outcome], _remark(base)):
            different.setdefault(key, []).append(verdict.variant)
    for (outcome, remark), variants in different.items():
        remarks.append(f"{', '.join(variants)}: {outcome}" + (f" ({remark})" if remark else ""))
    cells = (f"`{base.model_type}`", base.class_name, _OUTCOMES[base.outcome], _deviation(base), "; ".join(remarks))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _remark(verdict: Verdict) -> str:
    if verdict.unbuildable:
        return _short(verdict.unbuildable)
    served = [verdict.served[dtype] for dtype in ("bfloat16", "float32") if dtype in verdict.served]
    reasons = [_short(one.reason) for one in served if one.reason]
    if len({one.outcome == "refused" for one in served}) > 1:
        refused = next(dtype for dtype, one in verdict.served.items() if one.outcome == "refused")
        return f"in {refused} refused: {reasons[0]}"
    if reasons:
        return reasons[0]
    longest = min(one.max_len for one in served)
    return f"up to {longest} of {MAX_POSITIONS} positions" if longest < MAX_POSITIONS else ""


def _short(reason: str) -> str:
    short = reason.split(" cannot be served: ", 1)[-1]
    return short if len(short) <= _LONGEST_REASON else short[: _LONGEST_REASON - 1] + "…"


def _deviation(verdict: Verdict) -> str:
    served = verdict.served
    parts = []
    if _has_numbers(served.get("float32")):
        parts.append(f"{served['float32'].largest:.1g}")
    if _has_numbers(served.get("bfloat16")):
        parts.append(f"{served['bfloat16'].largest:.2g} ({served['bfloat16'].noise_largest:.2g})")
    return ", ".join(parts)


def _has_numbers(served: Served | None) -> bool:
    return served is not None and served.mean > 0
