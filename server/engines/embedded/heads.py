"""The value heads of a loaded model, from files, and a registry with one of them more or less.

Knows nothing of requests. Enter at `load_registry`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from server.control.registry import HeadRegistry
from server.engines.embedded.model.loader import LoadedModel
from server.errors import ConfigurationError, HeadMismatchError, UnknownHeadError
from value_models.heads import ValueHead
from value_models.store import (
    CARD_FILE,
    NAME_PATTERN,
    HeadCard,
    HeadFileError,
    load_head,
    shipped_heads_folder,
)


def load_registry(heads_dir: Path | None, loaded: LoadedModel) -> HeadRegistry:
    """The heads of a folder, by default those shipped for the model. Raises HeadMismatchError, ConfigurationError.

    A model that only shares its name with a shipped one, such as a fine-tune, is served without its heads.
    """
    if heads_dir is not None and not heads_dir.is_dir():
        raise ConfigurationError(f"heads_dir: {heads_dir} is not a folder")
    folder = heads_folder(heads_dir, loaded)
    return HeadRegistry.load(folder, loaded.identity, device=loaded.model.device, skip_mismatched=heads_dir is None)


def heads_folder(heads_dir: Path | None, loaded: LoadedModel) -> Path:
    return heads_dir or shipped_heads_folder(loaded.name)


def load_one_head(
    folder: Path, name: str, identity: dict[str, Any], device: torch.device | str
) -> tuple[ValueHead, HeadCard]:
    """One head by name. Raises UnknownHeadError, also for what is a path and no name, and HeadMismatchError."""
    present = [path.parent.name for path in folder.glob(f"*/{CARD_FILE}")]
    if not re.fullmatch(NAME_PATTERN, name) or name not in present:
        raise UnknownHeadError(name, present)
    try:
        head, card = load_head(folder / name, device=device)
    except HeadFileError as error:
        raise HeadMismatchError(f"The value head {name!r} cannot be read: {error}") from error
    if differences := card.base_model.differences(identity):
        raise HeadMismatchError(f"The value head {name!r} was made for another model: {'; '.join(differences)}.")
    if card.name != name:
        raise HeadMismatchError(f"The card in the folder {name!r} names its head {card.name!r}.")
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
