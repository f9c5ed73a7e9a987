"""Log records as lines."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from server.logs import JsonFormatter, LogFormat, TextFormatter, configure, request_id_var
from tests.api.conftest import complete


def record(message: str, *args: object, error: BaseException | None = None, **extra: object) -> logging.LogRecord:
    exc_info = None if error is None else (type(error), error, None)
    made = logging.LogRecord("a.b", logging.WARNING, __file__, 1, message, args, exc_info)
    made.__dict__.update(extra)
    return made


def told(made: logging.LogRecord) -> str:
    """What a line of text says behind its time."""
    return TextFormatter().format(made).partition(" ")[2]


@given(st.text(), st.text())
def test_a_record_is_one_line_whatever_it_says(message: str, argument: str) -> None:
    for formatter in (TextFormatter(), JsonFormatter()):
        line = formatter.format(record("%s " + message.replace("%", "%%"), argument))
        assert line.splitlines() == [line]
        assert "\x1b" not in line


def test_a_json_record_says_when_how_grave_where_and_what_and_for_which_request() -> None:
    token = request_id_var.set("r-1")
    try:
        entry = json.loads(JsonFormatter().format(record("cannot %s", "do it")))
    finally:
        request_id_var.reset(token)
    assert entry.pop("time").endswith("+00:00")
    assert entry == {"level": "warning", "logger": "a.b", "message": "cannot do it", "request_id": "r-1"}


def test_a_record_as_text_says_for_which_request_and_an_access_line_says_it_once() -> None:
    token = request_id_var.set("r-1")
    try:
        assert told(record("cannot do it")) == 'WARNING a.b: cannot do it request_id="r-1"'
        assert told(record("path", fields={"path": "/x"})) == "WARNING a.b: path"
    finally:
        request_id_var.reset(token)
    assert told(record("cannot do it")) == "WARNING a.b: cannot do it"


def test_a_record_as_text_begins_with_the_time_as_json_has_it() -> None:
    made = record("cannot do it")
    made.created = 0.25
    assert TextFormatter().format(made) == "1970-01-01T00:00:00.250+00:00 WARNING a.b: cannot do it"
    assert json.loads(JsonFormatter().format(made))["time"] == "1970-01-01T00:00:00.250+00:00"


def test_fields_of_a_record_become_fields_of_the_object() -> None:
    entry = json.loads(JsonFormatter().format(record("text", fields={"path": "/x\n", "status": 200})))
    assert (entry["path"], entry["status"]) == ("/x\n", 200)
    assert "message" not in entry


def test_an_errors_own_text_passes_for_no_record() -> None:
    error = ValueError("bad\nERROR root: FAKE")
    text = TextFormatter().format(record("failed", error=error))
    assert [line[:4] for line in text.splitlines()[1:]] == ["  | "] * 2
    line = JsonFormatter().format(record("failed", error=error))
    assert line.splitlines() == [line]
    assert "FAKE" in json.loads(line)["exception"]


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_what_is_configured_is_what_is_written(log_format: LogFormat, capsys: pytest.CaptureFixture[str]) -> None:
    configure(log_format, "warning")
    logging.getLogger("x").info("no")
    logging.getLogger("x").warning("yes")
    written = capsys.readouterr().err.splitlines()
    assert len(written) == 1
    assert (
        written[0].endswith(" WARNING x: yes") if log_format == "text" else json.loads(written[0])["message"] == "yes"
    )


def test_the_access_line_says_who_asked_for_what_and_what_it_took(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="recontrol.access"):
        complete(client, max_tokens=3, n=2, user="me", stream=True)
        complete(client, temperature=9)
    first, second = (json.loads(JsonFormatter().format(made)) for made in caplog.records)
    assert first["request_id"]
    assert first["duration_s"] >= 0
    told = ("method", "path", "status", "key", "model", "prompts", "n", "user", "prompt_tokens", "completion_tokens")
    assert [first[name] for name in told] == [
        "POST", "/v1/completions", 200, "anonymous", "fake", 1, 2, "me", 5, 6
    ]  # fmt: skip
    assert second["status"] == 400
    assert "model" not in second


@pytest.mark.parametrize(("fields", "user"), [({}, "new"), ({"user": "old"}, "old"), ({"user": None}, "new")])
def test_the_access_line_takes_openais_newer_name_of_the_user(
    client: TestClient, caplog: pytest.LogCaptureFixture, fields: dict[str, Any], user: str
) -> None:
    with caplog.at_level("INFO", logger="recontrol.access"):
        complete(client, max_tokens=1, safety_identifier="new", **fields)
    assert json.loads(JsonFormatter().format(caplog.records[0]))["user"] == user
