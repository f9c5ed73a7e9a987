"""The figures of quality that the pages show are those of the heads' cards and the studies' files."""

import json
from pathlib import Path

import pytest

from benchmarks import readme
from benchmarks.quality.objectives import OBJECTIVES_FILE
from benchmarks.quality.objectives_report import objectives_tables
from benchmarks.quality.report import SECTIONS, TRANSCRIPT_FILE, transcript
from server.settings import DEFAULT_MODEL
from tests.pages.pages import PAGES, section, text_of
from value_models.store import CARD_FILE, HeadCard, load_card, shipped_heads_folder

FOLDER = shipped_heads_folder(DEFAULT_MODEL)


def cards(folder: Path) -> list[HeadCard]:
    return [load_card(path.parent) for path in sorted(folder.glob(f"*/{CARD_FILE}"))]


@pytest.mark.parametrize("name", SECTIONS)
def test_what_the_pages_show_of_the_heads_is_rendered_from_their_cards(name: str) -> None:
    texts = [text_of(page) for page in PAGES if "gemma" not in str(page)]
    shown = [body for text in texts if (body := section(text, name)) is not None]
    assert shown == [SECTIONS[name](cards(FOLDER)).strip()]


def test_the_second_models_page_is_rendered_from_its_card() -> None:
    folder = shipped_heads_folder("gemma-3-270m")
    page = (folder / "README.md").read_text()
    for name in ("heads", "commands"):
        assert section(page, name) == SECTIONS[name](cards(folder)).strip()


def test_no_field_that_is_said_to_be_held_takes_pinned_control_back() -> None:
    found = json.loads(Path("benchmarks/results/pinned.json").read_text())
    falls = {attempt["field"] for attempt in found["attempts"] if attempt["change"]["high"] < 0}
    assert not falls & {attempt["field"] for attempt in found["attempts"] if attempt["kind"] == "held"}
    assert found["num_prompts"] == 64


def test_what_objectives_do_is_what_the_study_found() -> None:
    found = FOLDER / OBJECTIVES_FILE
    rendered = objectives_tables(json.loads(found.read_text())) if found.exists() else ""
    assert section(text_of(FOLDER / "README.md"), "objectives") == rendered


def test_the_transcript_is_what_compare_wrote() -> None:
    assert section(text_of("docs/quality.md"), "transcript") == transcript(FOLDER / TRANSCRIPT_FILE)


@pytest.mark.parametrize("name", ["readme-sample", "readme-quality", "readme-speed"])
def test_the_readmes_tables_are_taken_from_the_same_files_as_the_long_ones(name: str) -> None:
    assert section(text_of("README.md"), name) == readme.sections()[name]
