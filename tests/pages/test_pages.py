"""Links, commands and places that the pages name exist, and the pages are as long as a reader bears."""

import re
import shlex
from pathlib import Path

import pytest
from pydantic import BaseModel

from benchmarks.critic import Critics
from benchmarks.critic_sampling import CriticSampling
from benchmarks.dialogues.command import Dialogues
from benchmarks.fields import Fields
from benchmarks.fields_sampling import FieldsSampling
from benchmarks.guard.command import Guard
from benchmarks.judges.command import Judges
from benchmarks.pinned.command import Pinned
from benchmarks.quality.command import Quality
from benchmarks.quality.report import Report
from benchmarks.reward_levels import RewardLevelsStudy
from benchmarks.reward_search import RewardSearch
from benchmarks.roads.command import Roads
from benchmarks.speed.command import Speed
from server.cli.program import COMMANDS, command_class
from server.control.params import MAX_KL_NATS, MAX_SHIFT_RATIO, MAX_STEP_SIZE, MAX_STEPS, ControlParams
from server.control.repair import DEFAULT_REPLACEMENT, Replace, Retry, Stop
from tests.clients.lm_evaluation.command import LmEvaluation
from tests.pages.pages import PAGES, anchors, text_of
from tests.soak.command import Soak

API_PAGE = text_of("docs/http-api.md")
PROGRAMS: dict[str, type[BaseModel]] = {
    **{f"recontrol {name}": command_class(name) for name in COMMANDS},
    "python -m benchmarks.critic": Critics,
    "python -m benchmarks.critic_sampling": CriticSampling,
    "python -m benchmarks.dialogues": Dialogues,
    "python -m benchmarks.fields": Fields,
    "python -m benchmarks.fields_sampling": FieldsSampling,
    "python -m benchmarks.guard": Guard,
    "python -m benchmarks.judges": Judges,
    "python -m benchmarks.pinned": Pinned,
    "python -m benchmarks.quality": Quality,
    "python -m benchmarks.quality.report": Report,
    "python -m benchmarks.reward_levels": RewardLevelsStudy,
    "python -m benchmarks.reward_search": RewardSearch,
    "python -m benchmarks.roads": Roads,
    "python -m benchmarks.speed": Speed,
    "python -m tests.clients.lm_evaluation": LmEvaluation,
    "python -m tests.soak": Soak,
}
BY_ARGPARSE = {
    "python -m benchmarks.edit": "benchmarks/edit/command.py",
    "python -m benchmarks.guidance": "benchmarks/guidance.py",
    "python -m benchmarks.tool_calls": "benchmarks/tool_calls.py",
    "python -m benchmarks.training_memory": "benchmarks/training_memory.py",
}
WITHOUT_FLAGS = {"python -m benchmarks.readme", "python -m tests.browser.screenshots"}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link, part in re.findall(r"\]\((?!https?://)([^)#]*)(?:#([^)]+))?\)", page.read_text()):
        place = page.parent / link if link else page
        assert place.exists(), link
        if part:
            assert part in anchors(place.read_text()), (link, part)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=str)
def test_every_command_of_ours_that_a_page_tells_to_run_exists_with_its_flags(page: Path) -> None:
    shown = page.read_text()
    ours = r"(?:recontrol|python -m (?:benchmarks|tests)\.[\w.]+)"
    lines = re.findall(rf"(?m)^    (?:\w+=\S+ )*(?:\.venv/bin/)?({ours} .+?)(?:  +#.*)?$", shown)
    lines += re.findall(rf"`({ours} [^`]+)`", shown)
    for line in lines:
        if (words := shlex.split(line))[1:] in (["--help"], ["--version"]):
            continue
        known = PROGRAMS.keys() | BY_ARGPARSE.keys() | WITHOUT_FLAGS
        name = next((name for number in (3, 2) if (name := " ".join(words[:number])) in known), None)
        assert name, line
        for word in words[len(name.split()) :]:
            if word.startswith("--") and word != "--help":
                assert has_flag(name, word.partition("=")[0]), line


def has_flag(program: str, flag: str) -> bool:
    if program in BY_ARGPARSE:
        return f'"{flag}"' in text_of(BY_ARGPARSE[program])
    fields, field = PROGRAMS[program].model_fields if program in PROGRAMS else {}, flag[2:].replace("-", "_")
    return field in fields or field.removeprefix("no_") in fields


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_target_of_make_that_a_page_names_exists(page: Path) -> None:
    targets = set(re.findall(r"(?m)^([\w-]+):", Path("Makefile").read_text()))
    named = re.findall(r"`make ([\w-]+)|^    make ([\w-]+)", page.read_text(), re.MULTILINE)
    assert {first or second for first, second in named} <= targets


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_module_that_a_page_tells_to_run_exists(page: Path) -> None:
    for module in set(re.findall(r"python -m ((?:tests|benchmarks)[\w.]*)", page.read_text())):
        place = Path(module.replace(".", "/"))
        assert (place / "__main__.py").exists() or place.with_suffix(".py").exists(), module


def test_every_file_that_the_pages_name_in_code_exists() -> None:
    for page in (path for path in PAGES if path.parent.name == "docs"):
        for name in re.findall(r"`((?:server|value_models|tests|deploy)/[\w./-]+)`", page.read_text()):
            assert Path(name).exists(), (page, name)


def test_the_readme_fits_on_a_few_screens_and_its_tables_on_one() -> None:
    lines = text_of("README.md").splitlines()
    assert len(lines) <= 200
    assert max(line.count("|") - 1 for line in lines if line.startswith("|")) <= 6


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "docs"], ids=str)
def test_every_page_opens_with_what_it_is_for_and_is_part_of_the_site(page: Path) -> None:
    if page.name != "architectures.md":
        assert text_of(page).split("\n\n")[1].startswith("This page ")
    assert f"\n   {page.stem}\n" in text_of("docs/index.rst")


def test_every_place_to_add_things_exists_and_is_one_or_two_files_but_for_what_knows_of_it() -> None:
    table = text_of("docs/architecture.md").partition("| to add | touch |")[2].partition("\n\n")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) > 15
    for row in rows:
        places = re.findall(r"`([\w./*]+/[\w.*]*)`", row)
        sources = "".join(found.read_text() for place in places for found in Path().glob(place) if found.is_file())
        assert 1 <= len(re.findall(r"`[\w./*]+/[\w.*]*`", row.partition(";")[0])) <= 2, row
        assert all(any(Path().glob(place)) for place in places), row
        assert all(name in sources for name in re.findall(r"`(_?[A-Z][A-Z_]+|_[A-Z]\w+)`", row)), row


def test_every_fault_has_tests_that_exist() -> None:
    faults = API_PAGE.partition("\n## Faults\n")[2].partition("\n## ")[0]
    rows = [line for line in faults.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 18
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
    (row,) = [line for line in text_of("docs/control.md").splitlines() if line.startswith(f"| `{field}`")]
    assert f"| {default} |" in row
    assert f"{largest:g} |" in row


def test_the_table_of_a_guardrails_repair_tells_every_field_with_its_default() -> None:
    part = text_of("docs/control.md").partition("\n### Repair\n")[2].partition("\n## ")[0]
    rows = {found[1]: line for line in part.splitlines() if (found := re.match(r"\| `(\w+)` \|", line))}
    assert rows.keys() == {name for kind in (Stop, Retry, Replace) for name in kind.model_fields} - {"type"}
    for name, row in rows.items():
        for kind in (Retry, Replace):
            default = kind.model_fields[name].default if name in kind.model_fields else None
            told = default if isinstance(default, str) or default is None else f"{default:g}"
            assert told is None or f"| {told}" in row
    assert f"`{DEFAULT_REPLACEMENT}`" in part
