"""The page on the HTTP API shows fields, settings and incidents that exist, and all of them."""

import ast
import json
import re
from pathlib import Path

import pytest

from server.api.messages import VARIABLES
from server.api.resolution import MAX_PROMPT_SCORES
from server.api.responses.body import ResponseBody
from server.api.schemas import ChatBody, CompletionBody
from server.api.unserved import CHAT, COMPLETION, GENERATION, RESPONSE, Unserved
from server.api.value import MAX_READ_TOKENS, ValueBody
from server.calls.formats import FORMATS
from server.engines.embedded.background import BESIDE_REQUESTS
from server.settings import Settings
from server.training.jobs import MAX_ENDED, MAX_QUEUED
from server.training.request import MAX_CHARS, MAX_PROMPTS, MAX_TEXTS, HeadRequest
from server.training.trainer import MAX_STATE_BYTES

BOTH = COMPLETION | CHAT
TESTS = Path("tests/api/test_incidents.py")
PAGE = "\n".join(Path(f"docs/{name}.md").read_text() for name in ("http-api", "access"))
SECTIONS = {text.partition("\n")[0]: text for text in PAGE.split("\n## ")}
INCIDENTS = [line for line in SECTIONS["Known incidents"].splitlines() if line.startswith("| ")][1:]


def incident_tests() -> dict[str, str]:
    """Name -> docstring."""
    nodes = ast.parse(TESTS.read_text()).body
    return {n.name: ast.get_docstring(n) or "" for n in nodes if isinstance(n, ast.FunctionDef)}


@pytest.mark.parametrize("row", INCIDENTS)
def test_an_incidents_tests_exist_and_name_it(row: str) -> None:
    incident, named = row.strip("| ").split(" | ")
    names = re.findall(r"`(test_\w+)`", named)
    assert names
    ids = re.findall(r"CVE-\d+-\d+|#\d+", incident)
    for name in names:
        assert name in incident_tests()
    told = " ".join(incident_tests()[name] for name in names)
    assert all(identifier in told for identifier in ids)


def test_every_incident_is_told() -> None:
    assert len(INCIDENTS) == 23
    told = {name for row in INCIDENTS for name in re.findall(r"`(test_\w+)`", row)}
    with_docstring = {name for name, doc in incident_tests().items() if name.startswith("test_") and doc}
    assert told == with_docstring


def test_the_table_of_fields_has_every_field_and_no_other() -> None:
    rows = [line for line in SECTIONS["Fields"].splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(named) == sorted(set(CompletionBody.model_fields) | set(ChatBody.model_fields))


def row_of(name: str, field: Unserved) -> str:
    taken = ", ".join(f"`{json.dumps(value)}`" for value in field.harmless)
    return f"| `{name}` | {taken or '-'} | {field.reason} |"


def test_the_table_of_fields_that_are_not_served_is_that_of_the_code() -> None:
    rows = [line for line in SECTIONS["Fields that are not served"].splitlines() if line.startswith("| `")]
    assert rows == [row_of(name, field) for name, field in BOTH.items()]


def test_the_tables_of_a_response_have_every_field_and_no_other() -> None:
    fields, refused = SECTIONS["Responses"].split("### Fields that a response does not have")
    rows = [line for line in fields.splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(named) == sorted(ResponseBody.model_fields)
    assert [line for line in refused.splitlines() if line.startswith("| `")] == [
        row_of(name, field) for name, field in RESPONSE.items() if name not in GENERATION
    ]


def test_every_variable_that_a_template_may_be_told_is_listed() -> None:
    assert all(f"`{name}`" in SECTIONS["Messages"] for name in VARIABLES)


def test_the_table_of_scoring_has_every_field_and_no_other() -> None:
    scoring = SECTIONS["Scoring texts"]
    rows = [line for line in scoring.splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(named) == sorted(ValueBody.model_fields)
    assert f"{MAX_READ_TOKENS:,} tokens" in scoring
    assert f"{MAX_PROMPT_SCORES:,} values" in scoring


def test_the_table_of_what_a_head_is_trained_by_has_every_field_and_no_other() -> None:
    rows = SECTIONS["Management"].split("### Training heads")[1].split("The answer is a 202")[0].splitlines()
    named = [name for row in rows if row.startswith("| `") for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(named) == sorted(HeadRequest.model_fields)
    limits = (MAX_TEXTS, MAX_PROMPTS, MAX_CHARS, MAX_QUEUED, MAX_ENDED, BESIDE_REQUESTS, MAX_STATE_BYTES // 2**30)
    assert all(f"{limit:,}" in SECTIONS["Management"] for limit in limits)


def test_the_settings_that_it_names_exist() -> None:
    flags = {flag.replace("-", "_") for flag in re.findall(r"`--([a-z-]+)", PAGE)}
    assert len(flags) > 10
    assert flags <= set(Settings.model_fields)


def test_every_form_of_calls_is_in_the_table_of_models() -> None:
    calls = Path("docs/models.md").read_text().split("## Calls of tools")[1].partition("\n## ")[0]
    named = [
        re.findall(r"`([\w-]+)`", line)[0] for line in calls.splitlines() if line.startswith("| `") and "--" not in line
    ]
    assert named == list(FORMATS)
