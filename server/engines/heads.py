"""The value heads that an engine offers: where they come from, and a registry with one of them more or less.

Knows nothing of requests or of what runs the model. Enter at `HeadSource.of`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from server.control.registry import HeadRegistry, base_warning
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

    @property
    def facts(self) -> dict[str, Any]:
        """The card as plain JSON data."""
        return self.card.model_dump(mode="json")


@dataclass(slots=True, frozen=True)
class HeadSource:
    """A folder or store of heads, and the model that they are to serve, by its identity."""

    location: str | Path
    identity: dict[str, Any]
    skip_mismatched: bool = False
    """Whether what does not fit the model is left out when all are loaded: nobody has named these heads."""
    allow_other_base: bool = False

    @classmethod
    def of(
        cls, heads_dir: str | Path | None, identity: dict[str, Any], *, allow_other_base: bool = False
    ) -> HeadSource:
        """The folder or store that a user has named, or else the heads shipped for the model.

        A model that only shares its name with a shipped one, such as a fine-tune, is served without its heads unless
        those of another model are allowed.
        """
        location = heads_dir or shipped_heads_folder(identity["name"])
        return cls(location, identity, skip_mismatched=heads_dir is None, allow_other_base=allow_other_base)

    def load(self, device: torch.device | str = "cpu") -> HeadRegistry:
        """All of them. Raises HeadMismatchError, ConfigurationError."""
        return HeadRegistry.load(
            self.location,
            self.identity,
            device=device,
            skip_mismatched=self.skip_mismatched,
            allow_other_base=self.allow_other_base,
        )

    def load_one(self, name: str, device: torch.device | str = "cpu") -> OfferedHead:
        """One by name, by the rule that holds at start.

        Raises UnknownHeadError, also for what is a path and no name, and HeadMismatchError.
        """
        try:
            folder = open_heads(self.location)
            if name not in (present := folder.names()):
                raise UnknownHeadError(name, present)
            head, card = folder.load(name, device=device)
        except HeadFileError as error:
            raise HeadMismatchError(f"The value head {name!r} cannot be read: {error}") from error
        warning = base_warning(card, self.identity, self.location, allow_other_base=self.allow_other_base)
        if warning is not None:
            _log.warning("%s", warning)
        return OfferedHead(head, card, warning)


def facts(registry: HeadRegistry) -> dict[str, Mapping[str, Any]]:
    """Name -> the head's card as plain JSON data."""
    return {name: card.model_dump(mode="json") for name, card in registry.cards().items()}


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
