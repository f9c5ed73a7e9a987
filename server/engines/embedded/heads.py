"""The value heads of a loaded model, from files, and a registry with one of them more or less.

Knows nothing of requests. Enter at `load_registry`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from server.control.registry import HeadRegistry, base_warning
from server.engines.embedded.model.loader import LoadedModel
from server.errors import HeadMismatchError, UnknownHeadError
from value_models.errors import HeadFileError
from value_models.head_folder import open_heads
from value_models.heads import ValueHead
from value_models.store import HeadCard, shipped_heads_folder

_log = logging.getLogger(__name__)


@dataclass(slots=True, frozen=True, eq=False)
class OfferedHead:
    """A head that may be served, and what its users must know if it was made for another model."""

    head: ValueHead
    card: HeadCard
    warning: str | None


def load_registry(heads_dir: str | Path | None, loaded: LoadedModel, *, allow_other_base: bool = False) -> HeadRegistry:
    """The heads of a folder or store, by default those shipped for the model.

    A model that only shares its name with a shipped one, such as a fine-tune, is served without its heads unless those
    of another model are allowed. Raises HeadMismatchError, ConfigurationError.
    """
    return HeadRegistry.load(
        heads_location(heads_dir, loaded),
        loaded.identity,
        device=loaded.model.device,
        skip_mismatched=heads_dir is None,
        allow_other_base=allow_other_base,
    )


def heads_location(heads_dir: str | Path | None, loaded: LoadedModel) -> str | Path:
    return heads_dir or shipped_heads_folder(loaded.name)


def load_one_head(
    location: str | Path,
    name: str,
    identity: Mapping[str, Any],
    device: torch.device | str,
    *,
    allow_other_base: bool = False,
) -> OfferedHead:
    """One head by name, by the rule that holds at start.

    Raises UnknownHeadError, also for what is a path and no name, and HeadMismatchError.
    """
    try:
        folder = open_heads(location)
        if name not in (present := folder.names()):
            raise UnknownHeadError(name, present)
        head, card = folder.load(name, device=device)
    except HeadFileError as error:
        raise HeadMismatchError(f"The value head {name!r} cannot be read: {error}") from error
    warning = base_warning(card, identity, location, allow_other_base=allow_other_base)
    if warning is not None:
        _log.warning("%s", warning)
    return OfferedHead(head, card, warning)


def with_head(registry: HeadRegistry, offered: OfferedHead) -> HeadRegistry:
    """A registry with one head more, or another in its place."""
    name, warnings = offered.card.name, registry.warnings()
    # The one in its place may have been made for this model.
    warnings.pop(name, None)
    if offered.warning is not None:
        warnings[name] = offered.warning
    return HeadRegistry({**_heads(registry), name: offered.head}, {**registry.cards(), name: offered.card}, warnings)


def without_head(registry: HeadRegistry, name: str) -> HeadRegistry:
    heads, cards, warnings = _heads(registry), registry.cards(), registry.warnings()
    del heads[name]
    cards.pop(name, None)
    warnings.pop(name, None)
    return HeadRegistry(heads, cards, warnings)


def _heads(registry: HeadRegistry) -> dict[str, ValueHead]:
    return {name: registry.head(name) for name in registry.names}
