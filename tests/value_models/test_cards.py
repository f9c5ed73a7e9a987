"""A card's figures as a line."""

from __future__ import annotations

import pytest

from value_models.cards import figures_text


@pytest.mark.parametrize(
    ("what", "compared", "told"),
    [("pairs", 16, "by chance alone such a share is off by 12%"), ("pairs", 100, None), ("couples of texts", 16, None)],
)
def test_a_share_of_few_pairs_says_how_far_chance_takes_it(what: str, compared: int, told: str | None) -> None:
    order = {"what": what, "compared": compared, "by_direction": 0.75, "by_value": 0.5}
    line = figures_text({"r2": {"all": 0.1}, "ascent_gain": 0.2, "order": order})
    assert f"of {compared} {what}, the direction puts 75% in order and the value 50%" in line
    assert (told in line) if told else ("chance" not in line)
