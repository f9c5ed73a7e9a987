"""Rivals that came later, added to what a card holds of a test set: the other methods' figures stay as they are.

Both results must be of the same head, prompts, judges and sampling, which their responses of the base model and of the
head tell. Enter at `with_rows`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.quality.rivals import RIVALS
from server.cli.claims import claims
from server.cli.methods import HEAD
from server.errors import ConfigurationError

_ALIKE = ("judges", "split", "num_prompts", "num_tuning_prompts", "control", "sampling", "divergence")
_LABELS = {method.label: place for place, method in enumerate(RIVALS.values())}


def with_rows(kept: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """A card's result with the arms of another one added, or in place of those of the same name.

    Claims are corrected for all of them together. Each area says up to which divergence it is. Raises
    ConfigurationError where the two cannot stand in one table.
    """
    _check_alike(kept, result)
    arms = _in_order(kept["arms"] | {name: arm for name, arm in result["arms"].items() if _rival(name)})
    head = arms[HEAD.label]
    gain_over = head.get("gain_over", {}) | result["arms"][HEAD.label].get("gain_over", {})
    arms[HEAD.label] = head | {"gain_over": {name: gain_over[name] for name in arms if name in gain_over}}
    return {
        **kept,
        "arms": arms,
        "claims": claims(arms),
        "areas": _joined_areas(kept.get("areas") or {}, result["areas"]),
        "compute_areas": _joined(kept.get("compute_areas") or {}, result["compute_areas"]),
        "strengths": _joined(kept["strengths"], result["strengths"]),
        "added_by": [*kept.get("added_by", []), result["command"]],
    }


def _check_alike(kept: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Raises ConfigurationError."""
    where = f"add_rows: the card's figures of {result['test_set']}"
    for name in _ALIKE:
        if kept.get(name) != result.get(name):
            raise ConfigurationError(
                f"{where} are of other {name} ({kept.get(name)} there, {result.get(name)} here); measure all methods"
            )
    for arm in ("base", HEAD.label):
        means = [one["arms"][arm]["reward"]["mean"] for one in (kept, result)]
        if means[0] != means[1]:
            raise ConfigurationError(
                f"{where} are of other responses of the arm {arm} (reward {means[0]} there, {means[1]} here); measure "
                "all methods"
            )


def _rival(arm: str) -> str | None:
    """The label of the rival whose arm it is."""
    label = arm.removesuffix(", best strength")
    return label if label in _LABELS else None


def _in_order(arms: Mapping[str, Any]) -> dict[str, Any]:
    """The base, rivals as tables have them, then the head's own."""
    rivals = sorted((name for name in arms if _rival(name)), key=lambda name: _LABELS[_rival(name) or ""])
    rest = [name for name in arms if name != "base" and not _rival(name)]
    return {name: arms[name] for name in ("base", *rivals, *rest)}


def _joined_areas(kept: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """The head's own area is the one that was there, over the divergences of that result."""
    if not kept or not more:
        return dict(kept or more)
    others = {name: figure for name, figure in more["gain"].items() if name != HEAD.name}
    added = {name: figure | {"max_kl": more["max_kl"]} for name, figure in others.items()}
    return {**kept, "gain": kept["gain"] | added, "head_over": kept["head_over"] | more["head_over"]}


def _joined(kept: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """By name within each part; of a list, whatever either has."""
    joined = dict(more) | dict(kept)
    for part, added in more.items():
        if isinstance(added, Mapping):
            joined[part] = dict(added) | dict(kept.get(part, {})) | {k: v for k, v in added.items() if k != HEAD.name}
        elif isinstance(added, list):
            joined[part] = list(dict.fromkeys([*kept.get(part, []), *added]))
    return joined
