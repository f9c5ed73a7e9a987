"""The soak: its plan, its judgement of answers, and the whole of it against a real server with a tiny model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from server.cli import run as run_command
from server.engines.embedded.model.loader import load_model
from tests.api.conftest import make_app  # noqa: F401
from tests.engines.test_contract import write_heads
from tests.soak import COMMAND, PROGRAM, answers, judge, run, watch
from tests.soak.answers import answer_of
from tests.soak.bad_input import MAX_BODY_BYTES, Refused, bad_input
from tests.soak.bodies import World
from tests.soak.plan import FAULTS, Planned, make_plan
from tests.soak.seen import Seen
from value_models.heads import ValueHead

KEY = "soak-0123456789"
KINDS = bad_input("fake", 4096)


@pytest.fixture
def client(make_app: Callable[..., FastAPI]) -> Any:  # noqa: F811
    with TestClient(make_app(settings={"api_keys": KEY, "max_body_bytes": MAX_BODY_BYTES})) as client:
        yield client


def test_every_kind_of_bad_input_gets_its_status_and_names_its_field(client: TestClient) -> None:
    wrong = [problem for refused in KINDS for problem in judge.problems_of(*asked(client, refused))]
    assert wrong == []
    assert len({refused.name for refused in KINDS}) == len(KINDS) > 100


WORLD = World("m", 1536, {"a": (0.0, 1.0), "b": (2.0, 0.5)}, ["one two three", "four"])


def test_a_plan_is_drawn_from_its_seed_and_asks_for_everything() -> None:
    plan = make_plan(3, 3000, WORLD)
    assert plan == make_plan(3, 3000, WORLD)
    assert plan != make_plan(4, 3000, WORLD)
    assert {planned.fault for planned in plan} == {None, *FAULTS}
    routes = {
        f"{route}{tools}" for route in ("chat", "response") for tools in ("", " with tools", " with forced calls")
    }
    assert {planned.kind.removesuffix(", streamed") for planned in plan} == {"bad input", "completion", *routes}
    features = {feature for planned in plan if planned.refused is None for feature in planned.features}
    objectives = {f"control.objective: {name}" for name in ("weighted_sum", "worst_case", "target", "floor")}
    conditions = {
        f"control.{name}"
        for name in ("gate", "window", "schedule", "stop_below", "on_stop", "max_response_kl", "trace")
    }
    assert features >= objectives | conditions | {"echo", "logprobs", "stop", "several choices", "several prompts"}
    refused = [planned.refused.name for planned in plan if planned.fault == "bad input" and planned.refused is not None]
    assert set(refused) == {kind.name for kind in bad_input("m", 1536)}
    assert max(Counter(refused).values()) - min(Counter(refused).values()) == 1


BODY = {"model": "m", "prompt": "hi", "max_tokens": 3}
STREAM = Planned(0, "/v1/completions", {**BODY, "stream": True, "n": 2, "stream_options": {"include_usage": True}})
USAGE = {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6}


def event(*choices: tuple[int, str, str | None], **more: Any) -> str:
    listed = [{"index": i, "text": text, "logprobs": None, "finish_reason": end} for i, text, end in choices]
    return json.dumps({"id": "x", "choices": listed, **more})


A, B = event((0, "a", None)), event((1, "b", None))
A_ENDS, B_ENDS = event((0, "c", "length")), event((1, "d", "stop"))
TOTAL, DONE = event(usage=USAGE), "[DONE]"
EXPIRED = json.dumps({"error": {"message": "m", "type": "t", "param": None, "code": "deadline_exceeded"}})


def streamed(*events: str, **more: Any) -> Seen:
    return Seen(200, {"content-type": "text/event-stream; charset=utf-8"}, events=list(events), **more)


def test_a_stream_whose_choices_end_once_is_right_and_holds_their_texts() -> None:
    seen = streamed(A, B, B_ENDS, A_ENDS, TOTAL, DONE)
    assert judge.problems_of(STREAM, seen) == []
    assert [(answer.text, answer.finish_reason) for answer in answer_of(STREAM, seen)] == [
        ("ac", "length"),
        ("bd", "stop"),
    ]


@pytest.mark.parametrize(
    ("events", "what"),
    [
        ([A, B, B_ENDS, A_ENDS, TOTAL], "without [DONE]"),
        ([A, B, B_ENDS, A_ENDS, TOTAL, DONE, DONE], "[DONE] twice"),
        ([A, B, B_ENDS, TOTAL, DONE], "choice 0 ended 0 times"),
        ([A, B, B_ENDS, A_ENDS, A_ENDS, TOTAL, DONE], "went on after its end"),
        ([A, B, B_ENDS, A_ENDS, A, TOTAL, DONE], "went on after its end"),
        ([A, B, B_ENDS, A_ENDS, DONE], "usage events other than asked for"),
        ([A, B, B_ENDS, TOTAL, A_ENDS, DONE], "an event after the usage"),
        ([A, B, B_ENDS, event((0, "c", "abort")), TOTAL, DONE], "ended with 'abort'"),
        ([A, EXPIRED, DONE], "an error in mid-stream"),
        ([A, '{"id": "y", "choices": []}', DONE], "several ids"),
        ([A, "{}", DONE], "another form"),
        ([A, B, B_ENDS, A_ENDS, event(usage={**USAGE, "completion_tokens": 9}), DONE], "9 tokens, where 6"),
    ],
)
def test_a_stream_that_breaks_the_law_is_named(events: list[str], what: str) -> None:
    (problem,) = judge.problems_of(STREAM, streamed(*events))
    assert what in problem


def test_a_passed_deadline_and_a_client_that_left_need_no_end_of_a_choice() -> None:
    late = Planned(0, STREAM.path, STREAM.body, fault="deadline")
    assert judge.problems_of(late, streamed(A, EXPIRED, DONE)) == []
    assert judge.problems_of(late, streamed(EXPIRED, A, DONE)) != []
    assert judge.problems_of(STREAM, streamed(A, B, has_left=True)) == []
    assert judge.problems_of(STREAM, Seen(has_left=True)) == []
    assert judge.problems_of(STREAM, Seen(status=429, has_left=True)) == []
    assert judge.problems_of(STREAM, Seen(status=429)) != []
    assert judge.problems_of(STREAM, Seen(status=500, has_left=True)) != []
    assert "broke" in judge.problems_of(STREAM, streamed(A, error="ReadError()"))[0]


REFUSED = Planned(0, "/x", fault="bad input", refused=Refused("a kind", "/x", b"", 400, "n", "invalid_value"))
DETAIL = {"message": "n: no", "type": "t", "param": "n", "code": "invalid_value"}


@pytest.mark.parametrize(
    ("status", "body", "what"),
    [
        (200, {"error": DETAIL}, "status 200, not 400"),
        (400, {"error": {**DETAIL, "param": None}}, "param None, not 'n'"),
        (400, {"error": {**DETAIL, "code": "x"}}, "code 'x', not 'invalid_value'"),
        (400, {"error": DETAIL, "detail": 1}, "another body"),
        (400, {"detail": "n"}, "another body"),
        (400, {"error": {**DETAIL, "message": ""}}, "says nothing"),
    ],
)
def test_bad_input_that_is_answered_wrongly_is_named(status: int, body: dict[str, Any], what: str) -> None:
    headers = {"content-type": "application/json", "x-request-id": "r"}
    assert judge.problems_of(REFUSED, Seen(400, headers, json.dumps({"error": DETAIL}))) == []
    (problem,) = judge.problems_of(REFUSED, Seen(status, headers, json.dumps(body)))
    assert what in problem


def test_an_answer_is_compared_whole_or_as_far_as_it_was_read() -> None:
    whole = answers.Answer("abc", ["a", "b"], "stop", None, 1)
    begun = answers.Answer("ab", ["a"])
    assert answers.difference([whole], [whole], is_whole=True) is None
    assert answers.difference([begun], [whole], is_whole=False) is None
    assert "choice 0 began" in str(answers.difference([whole], [begun], is_whole=False))
    assert "choice 0 was" in str(answers.difference([begun], [whole], is_whole=True))


def test_memory_counts_from_the_end_of_the_warm_up() -> None:
    assert watch.growth_bytes([(1, 10), (2, 50), (3, 55), (4, 60), (10, 52)], 2) == 10
    assert watch.growth_bytes([(1, 10)], 2) is None


def test_a_log_tells_who_was_answered_twice_what_was_accepted_and_what_went_wrong(tmp_path: Path) -> None:
    facts = {"path": "/v1/completions", "level": "info", "model": "m"}
    records: list[Any] = [
        {**facts, "request_id": "a", "status": 200, "prompts": 2, "n": 3},
        {**facts, "request_id": "b", "status": 429, "prompts": 3, "n": 2},
        {**facts, "request_id": "c", "status": 400},
        {**facts, "request_id": "a", "status": 499, "prompts": 1, "n": 1},
        {"level": "error", "message": "Request x failed"},
    ]
    log = tmp_path / "log"
    log.write_text("Loading\n" + "\n".join(map(json.dumps, records)) + "\nTraceback\n")
    logged = watch.read_log(log)
    assert logged.statuses == {"a": [200, 499], "b": [429], "c": [400]}
    assert (logged.least_sequences, logged.most_sequences) == (7, 11)
    assert [line[:20] for line in logged.errors] == ['{"level": "error", "', "Traceback"]


@pytest.fixture
def soak(roomy_folder: Path, heads: dict[str, ValueHead], tmp_path: Path) -> Callable[..., int]:
    write_heads(tmp_path / "heads", heads, load_model(str(roomy_folder), device="cpu", dtype="float32").identity)

    def soak(*words: str) -> int:
        options = ["--model", str(roomy_folder), "--heads-dir", str(tmp_path / "heads"), "--dtype", "float32"]
        options += ["--device", "cpu", "--threads", "1", "--work", str(tmp_path), "--out", str(tmp_path / "out.json")]
        return run_command(COMMAND, PROGRAM, [*options, *words])

    return soak


def test_a_soaked_server_loses_nothing(
    soak: Callable[..., int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- bench-soak: begin -->\nold\n<!-- bench-soak: end -->\n")
    status = soak("--num-requests", "120", "--into", str(page))
    result = json.loads((tmp_path / "out.json").read_text())["soak"]
    assert (status, result["failures"]) == (0, [])
    assert sum(result["by_kind"].values()) == result["num_requests"] == 120
    assert set(result["faults"]) == set(FAULTS)
    assert {"200", "400", "408"} <= set(result["by_status"])
    assert "timeout" in result["retried"]
    assert (result["num_lost"], result["num_mismatches"], result["num_failures"]) == (0, 0, 0)
    assert result["num_compared"] > 10
    assert result["sequences_ended"]["abort"] > 0
    assert len(result["rss_series"]) >= 60
    assert "| **lost, ended twice or answered wrongly** | **0** |" in page.read_text()
    assert "**0** of" in capfd.readouterr().out


def test_a_page_without_the_soaks_section_is_named_before_anything_is_sent(
    soak: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- bench-offline: begin -->\nold\n<!-- bench-offline: end -->\n")
    assert soak("--into", str(page)) == 2
    said = capsys.readouterr().err
    assert said == f"{PROGRAM}: into: {page} has no section `<!-- bench-soak...: begin -->`\n"


def test_a_soak_that_finds_something_says_so_and_ends_with_1(
    soak: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The server does nothing wrong, so here its answers are misread: other when streamed than when whole."""

    def misread(planned: Planned, seen: Seen) -> list[answers.Answer]:
        read = answer_of(planned, seen)
        for answer in read:
            answer.text += str(planned.is_streamed)
        return read

    monkeypatch.setattr(run, "answer_of", misread)
    assert soak("--num-requests", "30") == 1
    said = capfd.readouterr().err
    assert "solo-" in said
    assert "and alone" in said


def asked(client: TestClient, refused: Refused) -> tuple[Planned, Seen]:
    key = {"authorization": f"Bearer {KEY}"} if refused.has_key else {}
    response = client.request(refused.method, refused.path, content=refused.content, headers={**key, **refused.headers})
    seen = Seen(response.status_code, dict(response.headers), response.text)
    return Planned(0, refused.path, fault="bad input", refused=refused), seen
