"""The README shows what the cards and the code say, no more."""

from pathlib import Path

import pytest

from server.cli.heads import evaluation_table
from server.settings import DEFAULT_MODEL
from server.types import (
    MAX_KL_NATS,
    MAX_SHIFT_RATIO,
    MAX_STEP_SIZE,
    MAX_STEPS,
    ControlParams,
)
from value_models.store import CARD_FILE, HeadCard, load_card, shipped_heads_folder

README = Path("README.md").read_text()


def cards() -> list[HeadCard]:
    folder = shipped_heads_folder(DEFAULT_MODEL)
    return [load_card(path.parent) for path in sorted(folder.glob(f"*/{CARD_FILE}"))]


def section(name: str) -> str:
    return README.split(f"<!-- {name}: begin -->")[1].split(f"<!-- {name}: end -->")[0].strip()


def test_the_tables_are_rendered_from_the_cards() -> None:
    assert section("heads") == evaluation_table(cards())
    assert section("stress") == evaluation_table(cards(), stress=True)


def test_the_commands_are_those_that_made_the_heads() -> None:
    for card in cards():
        assert card.command in section("commands")
        for result in (card.evaluation, card.stress):
            assert result is not None
            assert result["command"] in section("commands")


@pytest.mark.parametrize(
    ("field", "default", "largest"),
    [
        ("max_kl", 0.3, MAX_KL_NATS),
        ("step_size", 5, MAX_STEP_SIZE),
        ("steps", 10, MAX_STEPS),
        ("max_shift", 1, MAX_SHIFT_RATIO),
    ],
)
def test_the_table_of_control_fields_tells_defaults_and_ranges(field: str, default: float, largest: float) -> None:
    assert ControlParams.model_fields[field].default == default
    (row,) = [line for line in README.splitlines() if line.startswith(f"| `{field}`")]
    assert f"| {default} |" in row
    assert f"{largest:g} |" in row
