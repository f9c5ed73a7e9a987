"""docs/architectures.md, rendered from the JSON that a run writes."""
from __future__ import annotations
import json
from pathlib import Path
import transformers
from tests.architectures.verdict import Verdict

def write_json(verdicts: list[Verdict], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"transformers": transformers.__version__, "cases": [v.to_json() for v in verdicts]}, indent=1) + "\n")

def render(source: Path, path: Path) -> None:
    pass
