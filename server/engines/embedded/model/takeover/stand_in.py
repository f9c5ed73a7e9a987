"""The model at hand with short windows and chunks, so that a short text reaches beyond them.

Its own modules and weights run, with a smaller number where the real one stands; whoever asks then sees whether that
number is the one that its masks are made from. Knows nothing of proofs. Enter at `short_spans`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from server.engines.embedded.model.takeover.facts import LayerFacts

_SHORTEST = 20
_STEP = 4


def short_sizes(facts: Mapping[int, LayerFacts], reach: int) -> dict[int, int]:
    """By size of a window or chunk that a text of `reach` tokens does not show, the short one to show it with."""
    spans = [fact.kind.span for fact in facts.values()]
    sizes = {size for span in spans for size in (span.window, span.chunk) if size is not None}
    return {size: _SHORTEST + _STEP * place for place, size in enumerate(sorted(s for s in sizes if s > reach))}


@contextmanager
def short_spans(model: Any, sizes: Mapping[int, int]) -> Iterator[None]:
    """Within, every window and chunk of the model of one of these sizes is as short as it says."""
    changed: list[tuple[Any, str, int]] = []
    try:
        for holder in _holders(model):
            for name, value in list(vars(holder).items()):
                if type(value) is int and value in sizes and ("window" in name or "chunk" in name):
                    changed.append((holder, name, value))
                    setattr(holder, name, sizes[value])
        yield
    finally:
        for holder, name, value in changed:
            setattr(holder, name, value)


def _holders(model: Any) -> list[Any]:
    """The model's modules and all its configurations, each once."""
    holders: dict[int, Any] = {}
    for module in model.modules():
        holders[id(module)] = module
        config = getattr(module, "config", None)
        for found in (config, *_parts(config)):
            if found is not None:
                holders[id(found)] = found
    return list(holders.values())


def _parts(config: Any) -> list[Any]:
    return [getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ()]
