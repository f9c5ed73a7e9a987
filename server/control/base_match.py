"""Whether a head may be served with a model: one rule in one set of words, at start, over management, in every worker.

A head computes with states of its own size, so the hidden size must be the same. Another vocabulary or architecture, or
other weights, keep nothing from being computed, and KL is always that of the model that is served; but what a head has
learnt, and what its card tells, is of the model that it was made for. So such a head is refused unless whoever runs the
server has allowed it. Knows nothing of files or requests. Enter at `base_warning`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.errors import HeadMismatchError
from value_models.store import HeadCard


def base_warning(
    card: HeadCard, identity: Mapping[str, Any], location: str | Path, *, allow_other_base: bool
) -> str | None:
    """What users of the head must know when it was made for another model than the one with this identity.

    None when it was made for this one. Raises HeadMismatchError, which says what differs and what to do, when the head
    cannot be served, or is not allowed to be.
    """
    differences = card.base_model.differences(identity)
    if not differences:
        return None
    told = "; ".join(differences)
    refusal = (
        f"The value head {card.name!r} in {location} was not made for the model {identity.get('name')!r}: {told}. "
        "Train it for this model (`recontrol rollouts`, `recontrol train`), or serve from another --heads-dir"
    )
    if card.base_model.hidden_size != identity.get("hidden_size"):
        raise HeadMismatchError(f"{refusal}; states of another size cannot be read, whatever is allowed.")
    if not allow_other_base:
        raise HeadMismatchError(f"{refusal}, or serve it all the same with --allow-other-base.")
    return (
        f"The value head {card.name!r} was made for the model {card.base_model.name!r}, not for the "
        f"{identity.get('name')!r} that is served: {told}. Its values and its card's figures may not hold here, nor "
        "targets, floors, gates and bounds by them; budgets of KL do."
    )
