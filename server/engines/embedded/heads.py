"""The value heads of a loaded model, from files, and a registry with one of them more or less.

Knows nothing of requests. Enter at `load_registry`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from server.control.registry import HeadRegistry
from server.engines.embedded.model.loader import LoadedModel
from server.errors import HeadMismatchError, UnknownHeadError
from value_models.head_folder import open_heads
from value_models.heads import ValueHead
from value_models.store import HeadCard, HeadFileError, shipped_heads_folder


def load_registry(heads_dir: str | Path | None, loaded: LoadedModel) -> HeadRegistry:
    """The heads of a folder or store, by default those shipped for the model.

    A model that only shares its name with a shipped one, such as a fine-tune, is served without its heads. Raises
    HeadMismatchError, ConfigurationError.
    """
    location = heads_location(heads_dir, loaded)
    return HeadRegistry.load(location, loaded.identity, device=loaded.model.device, skip_mismatched=heads_dir is None)


def heads_location(heads_dir: str | Path | None, loaded: LoadedModel) -> str | Path:
    return heads_dir or shipped_heads_folder(loaded.name)


def load_one_head(
    location: str | Path, name: str, identity: dict[str, Any], device: torch.device | str
) -> tuple[ValueHead, HeadCard]:
    """One head by name. Raises UnknownHeadError, also for what is a path and no name, and HeadMismatchError."""
    try:
        folder = open_heads(location)
        if name not in (present := folder.names()):
            raise UnknownHeadError(name, present)
        head, card = folder.load(name, device=device)
    except HeadFileError as error:
        raise HeadMismatchError(f"The value head {name!r} cannot be read: {error}") from error
    if differences := card.base_model.differences(identity):
        raise HeadMismatchError(f"The value head {name!r} was made for another model: {'; '.join(differences)}.")
    return head, card


def with_head(registry: HeadRegistry, name: str, head: ValueHead, card: HeadCard) -> HeadRegistry:
    """A registry with one head more, or another in its place."""
    return HeadRegistry({**_heads(registry), name: head}, {**registry.cards(), name: card})


def without_head(registry: HeadRegistry, name: str) -> HeadRegistry:
    heads, cards = _heads(registry), registry.cards()
    del heads[name]
    cards.pop(name, None)
    return HeadRegistry(heads, cards)


def _heads(registry: HeadRegistry) -> dict[str, ValueHead]:
    return {name: registry.head(name) for name in registry.names}
