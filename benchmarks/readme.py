"""The README's three short tables, from the same JSON as the long ones: python -m benchmarks.readme."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.markdown import header, replace_sections, row
from benchmarks.quality.report import TRANSCRIPT_FILE
from benchmarks.quality.tables import share
from server.settings import DEFAULT_MODEL
from value_models.store import CARD_FILE, HeadCard, load_card, shipped_heads_folder

README = Path("README.md")
TEST_SETS = {"nontoxic": "rtp"}
"""Of heads for which the locked prompts are not meant: those are harmless."""
SPEED_FILE = Path("benchmarks/results/cpu.json")
ENGINES = {
    "recontrol": "recontrol, no control",
    "recontrol-1-head": "recontrol, one head",
    "recontrol-3-heads": "recontrol, three heads mixed",
    "vllm": "vLLM",
    "transformers": "transformers `generate`",
    "llama-cpp": "llama.cpp",
}


def sections() -> dict[str, str]:
    """Bodies by the name of the README's section."""
    folder = shipped_heads_folder(DEFAULT_MODEL)
    return {
        "readme-sample": sample(json.loads((folder / TRANSCRIPT_FILE).read_text())),
        "readme-quality": quality_table([load_card(path.parent) for path in sorted(folder.glob(f"*/{CARD_FILE}"))]),
        "readme-speed": speed_table(json.loads(SPEED_FILE.read_text())),
    }


def sample(transcript: Mapping[str, Any]) -> str:
    """The prompt and two responses, each up to the end of its last whole sentence."""
    responses = {name: _whole_sentences(transcript["responses"][name]) for name in ("base", "positive")}
    lines = [f"> **prompt:** {transcript['prompt']}", *(f"> **`{name}`:** {text}" for name, text in responses.items())]
    return "\n>\n".join([*lines, f"> `{transcript['command'].partition(' --out')[0]}`"])


def quality_table(cards: Sequence[HeadCard]) -> str:
    """A row for each head; the best rival is the method without the head that has the highest reward."""
    lines = header(["head", "base", "static vector", "best rival", "head", "head wins"])
    for card in cards:
        arms = (card.evaluation or {})[TEST_SETS.get(card.name, "locked")]["arms"]
        means = {name: arm["reward"]["mean"] for name, arm in arms.items()}
        rewards = [f"{means[name]:.2f}" for name in ("base", "static vector")]
        rivals = {name: mean for name, mean in means.items() if name != "base" and not name.startswith("head")}
        best = max(rivals, key=rivals.__getitem__)
        rival = f"{rivals[best]:.2f} ({best.removesuffix(', best strength')})"
        lines.append(
            row([f"`{card.name}`", *rewards, rival, f"{means['head']:.2f}", share(arms["head"]["win_over_base"])])
        )
    return "\n".join(lines)


def speed_table(result: Mapping[str, Any]) -> str:
    """Medians of new tokens a second by batch size, for the engines at one precision."""
    sizes = [str(size) for size in result["settings"]["batch_sizes"]]
    lines = header(["engine", *(f"batch {size}" for size in sizes)])
    for arm, name in ENGINES.items():
        batches = result["offline"][arm]["batches"]
        lines.append(row([name, *(f"{batches[size]['tokens_per_s']['median']:.0f}" for size in sizes)]))
    system = result["system"]
    return "\n".join([*lines, "", f"{result['settings']['dtype']}, {system['cpu']}, {system['date'][:10]}."])


def _whole_sentences(text: str) -> str:
    """Without what stands behind the last full stop."""
    return re.sub(r"(?<=[.!?])[^.!?]*$", "", " ".join(text.split()))


if __name__ == "__main__":
    replace_sections(README, sections())
