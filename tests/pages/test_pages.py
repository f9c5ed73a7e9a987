"""The README shows what the cards and the code say, no more."""

import json
import re
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest
from starlette.testclient import TestClient

from server.app import create_app
from server.cli import COMMANDS, command_class
from server.cli.objectives import OBJECTIVES_FILE
from server.cli.objectives_report import objectives_tables
from server.cli.report import SECTIONS, TRANSCRIPT_FILE, transcript
from server.control.objectives import BaseObjective
from server.engines.fake import FakeEngine
from server.settings import DEFAULT_MODEL, Settings
from server.types import (
    MAX_KL_NATS,
    MAX_SHIFT_RATIO,
    MAX_STEP_SIZE,
    MAX_STEPS,
    ControlParams,
)
from value_models.store import CARD_FILE, HeadCard, load_card, shipped_heads_folder

FOLDER = shipped_heads_folder(DEFAULT_MODEL)
PAGES = [Path("README.md").read_text(), (FOLDER / "README.md").read_text()]
README = PAGES[0]
API_PAGE = Path("server/api/README.md")
WITH_LINKS = [
    Path("README.md"),
    API_PAGE,
    Path("deploy/README.md"),
    Path("value_models/README.md"),
    FOLDER / "README.md",
]


def section(page: str, name: str) -> str | None:
    """What stands between its markers, if the page has them."""
    _, found, rest = page.partition(f"<!-- {name}: begin -->")
    return rest.split(f"<!-- {name}: end -->")[0].strip() if found else None


def cards(folder: Path) -> list[HeadCard]:
    return [load_card(path.parent) for path in sorted(folder.glob(f"*/{CARD_FILE}"))]


@pytest.mark.parametrize("name", SECTIONS)
def test_what_the_pages_show_of_the_heads_is_rendered_from_their_cards(name: str) -> None:
    shown = [text for page in PAGES if (text := section(page, name)) is not None]
    assert shown == [SECTIONS[name](cards(FOLDER)).strip()]


def test_the_second_models_page_is_rendered_from_its_card() -> None:
    folder = shipped_heads_folder("gemma-3-270m")
    page = (folder / "README.md").read_text()
    for name in ("heads", "commands"):
        assert section(page, name) == SECTIONS[name](cards(folder)).strip()


def test_what_objectives_do_is_what_the_study_found() -> None:
    found = FOLDER / OBJECTIVES_FILE
    rendered = objectives_tables(json.loads(found.read_text())) if found.exists() else ""
    assert section(PAGES[1], "objectives") == rendered


def test_the_transcript_is_what_compare_wrote() -> None:
    assert section(README, "transcript") == transcript(FOLDER / TRANSCRIPT_FILE)


def anchor(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", WITH_LINKS, ids=str)
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]*)(?:#([^)]+))?\)", page.read_text())
    assert links
    for link, part in links:
        place = page.parent / link if link else page
        assert place.exists(), link
        if part:
            assert part in {anchor(h) for h in re.findall(r"(?m)^#+ (.+)$", place.read_text())}, (link, part)


@pytest.mark.parametrize("page", WITH_LINKS, ids=str)
def test_every_command_of_ours_that_a_page_tells_to_run_exists_with_its_flags(page: Path) -> None:
    lines = re.findall(r"(?m)^    (?:\w+=\S+ )*recontrol (.+?)(?:  +#.*)?$", page.read_text())
    for line in lines:
        words = shlex.split(line)
        name = next(name for name in (" ".join(words[:2]), words[0]) if name in COMMANDS)
        fields = command_class(name).model_fields
        for word in words:
            if word.startswith("--"):
                field = word[2:].replace("-", "_")
                assert field in fields or field.removeprefix("no_") in fields, line


def test_every_place_to_add_things_exists() -> None:
    rows = [line for line in README.partition("| to add | touch |")[2].splitlines() if line.startswith("| ")]
    assert len(rows) > 20
    for row in rows:
        places = re.findall(r"`([\w./*]+/[\w.*]*)`", row)
        sources = "".join(found.read_text() for place in places for found in Path().glob(place) if found.is_file())
        assert all(any(Path().glob(place)) for place in places), row
        assert all(name in sources for name in re.findall(r"`(_?[A-Z][A-Z_]+)`", row)), row


def test_the_reward_that_it_shows_is_one() -> None:
    (code,) = re.findall(r"```python\n(# mine\.py\n.*?)```", README, re.DOTALL)
    module: dict[str, Any] = {}
    exec(code, module)
    assert module["kindness"](["hi", "hi"], ["Thank you, I am glad.", "No."]) == [2.0, 0.0]


def test_every_fault_has_tests_that_exist() -> None:
    faults = (API_PAGE.read_text()).partition("\n## Faults\n")[2].partition("\n## ")[0]
    rows = [line for line in faults.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 10
    source = "".join(path.read_text() for path in Path("tests").rglob("test_*.py"))
    for row in rows:
        names = re.findall(r"`(test_\w+)`", row)
        assert names
        assert all(f"def {name}(" in source for name in names), row


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


EXAMPLES = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", README, re.DOTALL)]


@pytest.mark.parametrize(
    "control", EXAMPLES, ids=lambda control: "-".join([control["objective"].get("type", ""), *control])
)
async def test_every_example_of_control_is_accepted_as_it_is_written(control: dict[str, Any]) -> None:
    heads = [path.parent.name for path in FOLDER.glob(f"*/{CARD_FILE}")]
    app = create_app(Settings(), engine=FakeEngine(heads=heads))
    body = {"model": "fake", "prompt": "hi", "max_tokens": 2, "control": control}
    with TestClient(app) as client:
        response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    assert set(response.json()["choices"][0]["control"]["value_after"]) == set(ControlParams(**control).head_names)


def test_every_objective_and_every_condition_has_an_example() -> None:
    types = {get_args(model.model_fields["type"].annotation)[0] for model in BaseObjective.__subclasses__()}
    assert {control["objective"].get("type", "weighted_sum") for control in EXAMPLES} == types
    conditions = set(ControlParams.model_fields) - {"objective", "max_shift", "trace"}
    assert {field for control in EXAMPLES for field in control} - {"objective"} == conditions
