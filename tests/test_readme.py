"""The README shows what the cards and the code say, no more."""

from pathlib import Path

import pytest

from server.cli.report import SECTIONS, TRANSCRIPT_FILE, transcript
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


@pytest.mark.parametrize("name", SECTIONS)
def test_what_the_readme_shows_of_the_heads_is_rendered_from_their_cards(name: str) -> None:
    assert section(name) == SECTIONS[name](cards()).strip()


def test_the_transcript_is_what_compare_wrote() -> None:
    assert section("transcript") == transcript(shipped_heads_folder(DEFAULT_MODEL) / TRANSCRIPT_FILE)


def test_every_head_was_evaluated_and_put_under_stress() -> None:
    assert cards()
    assert all(card.evaluation is not None and card.stress is not None for card in cards())


@pytest.mark.parametrize(
    ("field", "default", "largest"),
    [
        ("max_kl", 0.3, MAX_KL_NATS),
        ("step_size", 0.12, MAX_STEP_SIZE),
        ("steps", 10, MAX_STEPS),
        ("max_shift", 1, MAX_SHIFT_RATIO),
    ],
)
def test_the_table_of_control_fields_tells_defaults_and_ranges(field: str, default: float, largest: float) -> None:
    assert ControlParams.model_fields[field].default == default
    (row,) = [line for line in README.splitlines() if line.startswith(f"| `{field}`")]
    assert f"| {default} |" in row
    assert f"{largest:g} |" in row
