"""Judges by meaning: whether a response's embedding lies nearer to written examples of an aim or of its opposite.

The examples are whole sentences of the project's own (judges/anchors.json). The embeddings are MiniLM's, which no
lexicon of a reward went into. Enter at `ANCHORED`; to add an aim, write its two sets into the file.

Shapes: M texts, A sentences of a set, E size of an embedding.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from value_models.embeddings import embed

AIMS = ("positive", "plain", "neutral", "nontoxic")
_FILE = Path(__file__).parent / "judges" / "anchors.json"


def anchored(aim: str, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """The mean cosine of each response and the sentences for an aim, less that with the sentences against it.

    From -2 to 2; a response without words has a score too, the same for all. Raises MissingPackageError.
    """
    del prompts
    return [float(score) for score in (embed(responses) @ _direction(aim)).unbind()]


ANCHORED: dict[str, Callable[[Sequence[str], Sequence[str]], list[float]]] = {
    f"anchors_{aim}": functools.partial(anchored, aim) for aim in AIMS
}
"""By the judge's name."""


@functools.cache
def _direction(aim: str) -> Tensor:
    """[E]: the mean embedding of the sentences for an aim less that of those against it."""
    sides = json.loads(_FILE.read_text(encoding="utf-8"))[aim]
    wanted_AE, unwanted_AE = embed(sides["for"]), embed(sides["against"])
    return wanted_AE.mean(dim=0) - unwanted_AE.mean(dim=0)
