"""Rivals that come later beside what a card holds: which rows stay, what is claimed, and what cannot be joined."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.quality.added_rows import with_rows
from server.errors import ConfigurationError


def gain(p: float) -> dict[str, Any]:
    return {"reward": {"mean": 0.1, "low": 0.0, "high": 0.2, "p": p}}


def result(rivals: dict[str, float], *, max_kl: float = 0.3, base: float = 0.5, **other: Any) -> dict[str, Any]:
    """Of rivals by label, with the p-values of the head over them."""
    arms: dict[str, Any] = {"base": {"reward": {"mean": base}}}
    arms |= {rival: {"reward": {"mean": 0.6}} for rival in rivals}
    arms["head"] = {"reward": {"mean": 0.7}, "gain_over": {rival: gain(p) for rival, p in rivals.items()}}
    area = {name: {"mean": 0.2} for name in ("head", *rivals)}
    over = {name: {"mean": 0.1, "p": 0.01} for name in rivals}
    shared = {"judges": ["afinn"], "split": "test", "num_prompts": 3, "sampling": {"seed": 1}, "test_set": "project"}
    return {
        "arms": arms,
        "areas": {"max_kl": max_kl, "gain": area, "head_over": over},
        "compute_areas": {"max_times": 8.0, "gain": area, "head_over": over, "times": {name: [1.0] for name in area}},
        "strengths": {"best": dict.fromkeys(area, max_kl), "max_coherence_loss": 0.02, "unsound": list(rivals)},
        "command": f"measured {', '.join(rivals)}",
        **shared,
        **other,
    }


KEPT = result({"static vector": 0.01, "token log-odds": 0.02})
ADDED = result({"activation steering": 0.03, "static vector": 0.01}, max_kl=0.2)


def test_rows_stand_as_tables_have_them_and_claims_are_corrected_for_all() -> None:
    joined = with_rows(KEPT, ADDED)
    assert list(joined["arms"]) == ["base", "static vector", "token log-odds", "activation steering", "head"]
    assert [claim["over"] for claim in joined["claims"]] == ["static vector", "token log-odds", "activation steering"]
    assert [claim["holm"] for claim in joined["claims"]] == pytest.approx([0.03, 0.04, 0.04])
    assert (joined["command"], joined["added_by"]) == (KEPT["command"], [ADDED["command"]])


def test_areas_and_strengths_are_joined_and_the_heads_own_stay() -> None:
    joined = with_rows(KEPT, ADDED)
    assert joined["areas"]["gain"]["activation steering"]["max_kl"] == 0.2
    assert joined["areas"]["gain"]["head"] == KEPT["areas"]["gain"]["head"]
    assert set(joined["compute_areas"]["times"]) == set(joined["areas"]["gain"])
    assert joined["strengths"]["best"] | {"head": 0.3, "activation steering": 0.2} == joined["strengths"]["best"]
    assert joined["strengths"]["unsound"] == ["static vector", "token log-odds", "activation steering"]


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"judges": []}, "of other judges"),
        ({"sampling": {"seed": 2}}, "of other sampling"),
        ({"divergence": "exact"}, "of other divergence"),
        ({"base": 0.4}, "of other responses of the arm base"),
    ],
)
def test_what_cannot_stand_in_one_table_is_one_clear_line(other: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigurationError, match=f"add_rows: the card's figures of project are {what}"):
        with_rows(KEPT, result({"activation steering": 0.03}, **other))
