"""Bad input: a clear error that names the field, and the next request works."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from tests.api.conftest import chat, complete

BAD_NUMBERS = [-1, float("nan"), float("inf"), 1e308, True, "1"]
BAD_FIELDS = [
    *[("temperature", value) for value in BAD_NUMBERS],
    *[("top_p", value) for value in [1.1, *BAD_NUMBERS]],
    *[("max_tokens", value) for value in [1.5, 2**70, *BAD_NUMBERS]],
    *[("n", value) for value in [0, 10**6, 1.0, *BAD_NUMBERS]],
    *[("top_k", value) for value in [-2, 2**70, 1.5, True]],
    *[("seed", value) for value in [2**63, 1.5, True, "1"]],
    *[("logprobs", value) for value in [21, *BAD_NUMBERS]],
    *[("stop", value) for value in ["", [""], ["a"] * 65, ["a"] * 500_000, "a" * 257, 3, [1]]],
    *[("stream", value) for value in [1, "true"]],
    *[("stream_options", value) for value in [{"include_usage": True}, {"x": 1}, 3]],
    *[("user", value) for value in ["u" * 257, 3]],
    *[("min_p", value) for value in [1.1, *BAD_NUMBERS]],
    *[("presence_penalty", value) for value in [-2.1, 2.1, *BAD_NUMBERS[1:]]],
    *[("frequency_penalty", value) for value in [-2.1, 2.1, *BAD_NUMBERS[1:]]],
    *[("repetition_penalty", value) for value in [0, 0.05, 10.5, *BAD_NUMBERS]],
    *[("stop_token_ids", value) for value in [3, [256], [-1], [2**63], [1.5], [True], ["1"], [1] * 65]],
    *[("ignore_eos", value) for value in [1, "true"]],
    *[("logit_bias", value) for value in [3, [], {"256": 1}, {"-1": 1}, {"a": 1}, {"1.0": 1}, {"01": 1}, {"": 1}]],
    *[("logit_bias", {"1": value}) for value in [101, -101, *BAD_NUMBERS[1:], None]],
    ("logit_bias", {str(i): 0 for i in range(1025)}),
    *[("timeout_s", value) for value in [0, 86_401, *BAD_NUMBERS]],
    *[("best_of", value) for value in [2, 129, *BAD_NUMBERS]],
    *[("suffix", "x"), ("echo", "yes"), ("guided_json", {}), ("truncate_prompt_tokens", 1)],
]
BOUNDED: dict[str, Any] = {"stop_below": {"plain": 0.5}}
BAD_PROMPTS: list[Any] = [
    "", [], [[]], [""], ["a", ""], [[1], []], [256], [-1], [2**63], [1.5], [True], [[1], "a"], 3, None, {}, ["a"] * 65,
]  # fmt: skip
BAD_COUNTS: list[Any] = [0, 1.5, 2**63, *BAD_NUMBERS]
BOUND: dict[str, Any] = {"stop_below": {"plain": 0.0}}


def retry(**fields: Any) -> dict[str, Any]:
    return {"type": "retry", **fields}


BAD_CONTROLS: list[tuple[str, Any]] = [
    ("control.objective", {}),
    ("control.objective", {"objective": {"weights": {}}}),
    ("control.objective.type", {"objective": {"type": "sum", "weights": {"plain": 1}}}),
    *[
        ("control.objective.weights", {"objective": {"weights": {"plain": w}}})
        for w in [float("nan"), 1e308, True, "1"]
    ],
    *[("control.step_size", {"step_size": v}) for v in [11, *BAD_NUMBERS]],
    *[("control.steps", {"steps": v}) for v in [101, 1.5, *BAD_NUMBERS]],
    *[("control.max_kl", {"max_kl": v}) for v in [0, 0.51, *BAD_NUMBERS]],
    *[("control.max_shift", {"max_shift": v}) for v in [0, 2.01, *BAD_NUMBERS]],
    ("control.objective.type", {"objective": {"type": 3, "weights": {"plain": 1}}}),
    ("control.objective.values", {"objective": {"type": "target"}}),
    *[
        ("control.objective.values.plain", {"objective": {"type": "target", "values": {"plain": v}}})
        for v in [1e308, True, "1"]
    ],
    ("control.objective.floors", {"objective": {"type": "floor", "weights": {"plain": 1.0}}}),
    ("control.objective.weights.plain", {"objective": {"type": "worst_case", "weights": {"plain": 0}}}),
    *[("control.max_response_kl", {"max_response_kl": v}) for v in [0, 1e9, *BAD_NUMBERS]],
    *[
        ("control.gate", {"gate": v})
        for v in [
            1,
            {},
            {"head": "plain"},
            {"head": "plain", "below": 0, "above": 1},
            {"head": "plain", "below": 0, "hysteresis": -1},
        ]
    ],
    *[("control.stop_below", {"stop_below": v}) for v in [{}, 3, {"plain": "1"}, {"plain": 1e308}]],
    ("control", {"on_stop": "retry"}),
    *[("control.on_stop", {**BOUND, "on_stop": v}) for v in [3, []]],
    *[("control.on_stop.type", {**BOUND, "on_stop": v}) for v in ["undo", {}, {"type": "undo"}, {"hold_tokens": 3}]],
    *[("control.on_stop.max_retries", {**BOUND, "on_stop": retry(max_retries=v)}) for v in [17, *BAD_COUNTS]],
    *[("control.on_stop.rewind_tokens", {**BOUND, "on_stop": retry(rewind_tokens=v)}) for v in [257, *BAD_COUNTS]],
    *[("control.on_stop.hold_tokens", {**BOUND, "on_stop": retry(hold_tokens=v)}) for v in [257, *BAD_COUNTS]],
    *[("control.on_stop.step_growth", {**BOUND, "on_stop": retry(step_growth=v)}) for v in [0.9, 4.1, *BAD_NUMBERS]],
    *[("control.on_stop.then", {**BOUND, "on_stop": retry(then=v)}) for v in ["retry"]],
    *[("control.on_stop", {**BOUND, "on_stop": retry(**v)}) for v in [{"rewind_tokens": 9}, {"replacement": "a"}]],
    *[
        ("control.on_stop.replacement", {**BOUND, "on_stop": {"type": "replace", "replacement": v}})
        for v in ["", "a" * 4097, 3]
    ],
    ("control.on_stop.max_retries", {**BOUND, "on_stop": {"type": "stop", "max_retries": 1}}),
    *[
        ("control", {**BOUND, "on_stop": v, "search": {"type": "blocks"}})
        for v in ["retry", "replace", {"type": "stop", "hold_tokens": 1}]
    ],
    *[("control.window", {"window": v}) for v in [3, {"start": -1}, {"end": 0}, {"start": 3, "end": 3}]],
    *[("control.over_turns", {"over_turns": v}) for v in [3, {}, {"gates": {}}]],
    *[("control.over_turns.stop_below", {**BOUNDED, "over_turns": {"stop_below": v}}) for v in [3, {}]],
    *[
        ("control.over_turns.stop_below.plain", {**BOUNDED, "over_turns": {"stop_below": {"plain": v}}})
        for v in [3, {}, {"tighten": 0.1}, {"to": 0.9}]
    ],
    *[
        (f"control.over_turns.stop_below.plain.{name}", {**BOUNDED, "over_turns": {"stop_below": {"plain": rule}}})
        for name in ("tighten", "hold")
        for rule in [{"to": 1, name: v} for v in [-0.1, 3e6, "1", 1e999]]
    ],
    (
        "control.over_turns.stop_below.plain.to",
        {**BOUNDED, "over_turns": {"stop_below": {"plain": {"tighten": 0.1, "to": 0.4}}}},
    ),
    ("control.over_turns.stop_below.positive", {**BOUNDED, "over_turns": {"stop_below": {"positive": {"hold": 0.5}}}}),
    ("control.over_turns.floors.plain", {**BOUNDED, "over_turns": {"floors": {"plain": {"hold": 0.5}}}}),
    *[("control.schedule.type", {"schedule": v}) for v in [{}, {"type": "sine"}]],
    *[("control.schedule.tokens", {"schedule": {"type": "linear", "tokens": v}}) for v in [0, 1.5, *BAD_NUMBERS]],
    *[("control.schedule.to", {"schedule": {"type": "cosine", "tokens": 3, "to": v}}) for v in [2, *BAD_NUMBERS]],
    *[("control.schedule.half_life", {"schedule": {"type": "exponential", "half_life": v}}) for v in [0, "1", None]],
    *[("control.search", {"search": v}) for v in [3, [], "blocks"]],
    *[("control.search.type", {"search": v}) for v in [{}, {"type": "tree"}, {"type": None}]],
    *[("control.search.candidates", {"search": {"type": "blocks", "candidates": v}}) for v in [33, *BAD_COUNTS]],
    *[("control.search.block_tokens", {"search": {"type": "blocks", "block_tokens": v}}) for v in [4097, *BAD_COUNTS]],
    *[("control.search.reward", {"search": {"type": "blocks", "reward": v}}) for v in ["", "a" * 65, 3, ["a"], "mine"]],
    ("control.search.best", {"search": {"type": "blocks", "best": 1}}),
    ("control", 3),
]


def post(client: TestClient, body: dict[str, Any]) -> Any:
    """As json, but with Python's NaN and Infinity, which a hostile client can send."""
    content = json.dumps(body).encode()
    return client.post("/v1/completions", content=content, headers={"content-type": "application/json"})


def assert_refused(client: TestClient, response: Any, field: str, status: int = 400) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] is None or error["param"].startswith(field.split(".", maxsplit=1)[0]), error
    assert field in error["message"], error
    assert complete(client).status_code == 200


@pytest.fixture
def client(make_app: Callable[..., FastAPI]) -> Any:
    # A limit large enough for 500,000 stop strings to reach the schema.
    app = make_app()
    with TestClient(app) as client:
        yield client


@pytest.mark.parametrize(("field", "value"), BAD_FIELDS, ids=lambda v: str(v)[:24])
def test_a_bad_field_is_refused_by_name(client: TestClient, field: str, value: Any) -> None:
    response = post(client, {"model": "fake", "prompt": "hi", field: value})
    if response.status_code == 413:
        return
    assert_refused(client, response, field)


@pytest.mark.parametrize("prompt", BAD_PROMPTS, ids=lambda v: str(v)[:24])
def test_a_bad_prompt_is_refused_and_the_next_request_works(client: TestClient, prompt: Any) -> None:
    assert_refused(client, post(client, {"model": "fake", "prompt": prompt}), "prompt")


@pytest.mark.parametrize(("field", "control"), BAD_CONTROLS, ids=lambda v: str(v)[:40])
def test_bad_control_is_refused_by_its_path(client: TestClient, field: str, control: Any) -> None:
    if isinstance(control, dict) and control and "objective" not in control:
        control = {"objective": {"weights": {"plain": 1.0}}, **control}
    assert_refused(client, post(client, {"model": "fake", "prompt": "hi", "control": control}), field)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", []),
        ("messages.0.tool_call_id", [{"role": "tool", "content": "x"}]),
        ("messages.0.role", [{"role": "function", "content": "x"}]),
        ("messages.0.name", [{"role": "user", "content": "x", "name": "n" * 257}]),
        ("messages.0.content", [{"role": "user"}]),
        ("messages.0.content", [{"role": "developer", "content": []}]),
        ("messages.0.tool_calls.0.function", [{"role": "assistant", "tool_calls": [{"id": "a"}]}]),
        ("messages.0.audio", [{"role": "assistant", "audio": {"id": "a"}}]),
        ("messages.0.sender", [{"role": "assistant", "content": "x", "sender": "me"}]),
        ("messages.0.content", [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]),
        ("messages.0.content", [{"role": "user", "content": None}]),
        ("tools.0", [{}]),
        ("prompt", "hi"),
        ("best_of", 3),
        ("echo", True),
        ("chat_template", "{{ 1 }}"),
        ("chat_template_kwargs", {"tokenize": True}),
        ("top_logprobs", 3),
        ("max_tokens", 0),
    ],
)
def test_what_chat_does_not_serve_is_refused_with_a_reason(client: TestClient, field: str, value: Any) -> None:
    assert_refused(client, chat(client, **{field.partition(".")[0]: value}), field)


@pytest.mark.parametrize(
    ("field", "value"), [("control.objective", None), ("control.objective", []), ("control.window", 3)]
)
def test_what_must_be_an_object_is_told_in_words_of_json(client: TestClient, field: str, value: Any) -> None:
    control = {"objective": {"weights": {"plain": 1.0}}, field.partition(".")[2]: value}
    response = complete(client, control=control)
    assert_refused(client, response, field)
    assert response.json()["error"]["message"] == f"{field}: Input should be an object"


def test_a_body_for_the_other_endpoint_is_told_where_to_go(client: TestClient) -> None:
    for response, field, place in [
        (complete(client, messages=[{"role": "user", "content": "hi"}]), "messages", "/v1/chat/completions"),
        (chat(client, prompt="hi"), "prompt", "/v1/completions"),
        (chat(client, best_of=3), "best_of", "control.search"),
    ]:
        assert_refused(client, response, field)
        assert place in response.json()["error"]["message"]


def test_two_different_limits_are_refused(client: TestClient) -> None:
    assert_refused(client, chat(client, max_tokens=3, max_completion_tokens=4), "max_tokens")


@pytest.mark.parametrize("head", ["nobody", "plain.x"])
def test_an_unknown_head_is_a_404_that_lists_the_known(client: TestClient, head: str) -> None:
    response = complete(client, control={"objective": {"weights": {head: 1.0}}})
    assert response.status_code == 404
    assert "plain, positive" in response.json()["error"]["message"]
    assert complete(client, model=f"fake@{head}").status_code == 404
    assert client.get(f"/v1/heads/{head}").status_code == 404


@pytest.mark.parametrize(
    ("field", "control"),
    [
        ("control.objective.values", {"objective": {"type": "target", "values": {"nobody": 1.0}}}),
        (
            "control.objective.floors",
            {"objective": {"type": "floor", "weights": {"plain": 1.0}, "floors": {"nobody": 1.0}}},
        ),
        ("control.stop_below", {"objective": {"weights": {"plain": 1.0}}, "stop_below": {"nobody": 0.0}}),
        ("control.gate.head", {"objective": {"weights": {"plain": 1.0}}, "gate": {"head": "nobody", "below": 0.0}}),
    ],
)
def test_an_unknown_head_is_named_by_its_field(client: TestClient, field: str, control: dict[str, Any]) -> None:
    response = complete(client, control=control)
    assert response.status_code == 404
    assert response.json()["error"]["param"] == field


@pytest.mark.parametrize("path", ["../etc/passwd", "/etc/passwd", "http://x/y"])
def test_a_head_given_as_a_path_is_never_opened(client: TestClient, path: str) -> None:
    assert complete(client, control={"objective": {"weights": {path: 1.0}}}).status_code == 404
    assert complete(client, model=f"fake@{path}").status_code == 404


@pytest.mark.parametrize("model", ["nope", "fake@", "@fake", "FAKE"])
def test_an_unknown_model_is_a_404_that_lists_the_known(client: TestClient, model: str) -> None:
    response = complete(client, model=model)
    assert response.status_code == 404
    assert "fake" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        (b"null", 400),
        (b"", 400),
        (b"\xff\xfe", 400),
        (b"[" * 10_000 + b"]" * 10_000, 400),
        (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, 400),
        (b" " * 200_000, 413),
    ],
)
def test_a_body_that_is_no_request_is_refused(client: TestClient, content: bytes, status: int) -> None:
    response = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == status
    assert response.json()["error"]["message"]
    assert complete(client).status_code == 200


def test_a_large_body_without_a_length_is_stopped_while_it_is_read(client: TestClient) -> None:
    response = client.post("/v1/completions", content=(b" " * 10_000 for _ in range(20)))
    assert response.status_code == 413


def test_too_much_in_all_is_refused_at_once(client: TestClient) -> None:
    assert complete(client, prompt=["a"] * 64, n=128).status_code == 400
    assert complete(client, n=128, max_tokens=4000).status_code == 400
    response = complete(client, max_tokens=4096)
    assert response.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("send", [complete, chat])
def test_what_is_too_long_is_told_in_the_words_by_which_clients_know_it(
    client: TestClient, send: Callable[..., Any]
) -> None:
    error = send(client, max_tokens=4096).json()["error"]
    assert error["message"].startswith("This model's maximum context length is 4096 tokens. ")


@pytest.mark.parametrize(
    ("fields", "param", "allowed"),
    [
        ({"user": "x" * 9999}, "user", "at most 256 characters"),
        ({"model": ""}, "model", "at least 1 character"),
        (
            {"messages": [{"role": "tool", "content": "a", "tool_call_id": "x" * 257}]},
            "messages.0.tool_call_id",
            "at most 256 characters",
        ),
        (
            {"messages": [{"role": "tool", "content": "a", "tool_call_id": ""}]},
            "messages.0.tool_call_id",
            "at least 1 character",
        ),
        (
            {"messages": [{"role": "user", "content": "a", "name": "x" * 257}]},
            "messages.0.name",
            "at most 256 characters",
        ),
        ({"messages": []}, "messages", "at least 1 item"),
    ],
)
def test_the_length_of_a_text_is_told_in_characters_and_that_of_a_list_in_items(
    client: TestClient, fields: dict[str, Any], param: str, allowed: str
) -> None:
    error = chat(client, **fields).json()["error"]
    assert error["param"] == param
    assert allowed in error["message"]
    assert ("items" in error["message"] or "item " in error["message"]) == (param == "messages")


def test_a_chat_that_leaves_no_room_for_a_new_token_says_so(client: TestClient) -> None:
    error = chat(client, messages=[{"role": "user", "content": "a" * 5000}]).json()["error"]
    assert "leaves no room for a new one" in error["message"]
    assert error["code"] == "context_length_exceeded"


def test_zero_tokens_need_echo(client: TestClient) -> None:
    assert_refused(client, complete(client, max_tokens=0), "max_tokens")


def test_unknown_routes_and_methods_have_the_same_error_body(client: TestClient) -> None:
    assert client.get("/nope").json()["error"]["message"] == "There is no GET /nope. `GET /openapi.json` has all paths."
    assert client.get("/v1/completions").status_code == 405
    assert "error" in client.get("/v1/completions").json()
    for path in ("/v1/heads", "/v1/management/jobs"):
        assert "`--management-keys`" in client.post(path, json={}).json()["error"]["message"]


@pytest.mark.parametrize(
    "content", [b'{"prompt": ' + b"[" * 20_000, b'{"seed": ' + b"1" * 5000 + b"}", b'{"prompt": "\xff"}', b"{"],
    ids=["deep", "digits", "bytes", "open"],
)  # fmt: skip
def test_a_body_that_is_no_json_says_so(client: TestClient, content: bytes) -> None:
    response = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_json"


def test_a_failure_inside_says_nothing_of_the_inside(make_app: Callable[..., FastAPI]) -> None:
    app = make_app()
    app.state.engine.generate = lambda _: 1 / 0
    with TestClient(app, raise_server_exceptions=False) as client:
        response = complete(client)
    assert response.status_code == 500
    message = response.json()["error"]["message"]
    assert "division" not in message
    assert response.headers["x-request-id"] in message


@pytest.mark.parametrize("prompt", ["hello", ["hello", "world"]])
def test_a_failure_inside_in_mid_stream_is_an_error_event_that_says_nothing_of_the_inside(
    make_app: Callable[..., FastAPI], monkeypatch: pytest.MonkeyPatch, prompt: Any
) -> None:
    app = make_app()
    token = type(app.state.engine)._token
    monkeypatch.setattr(app.state.engine, "_token", lambda *args: token(app.state.engine, *args) // (2 - args[-1]))
    with TestClient(app) as client:
        response = complete(client, stream=True, prompt=prompt)
        events = response.text.split("\n\n")
        assert complete(client, max_tokens=2).status_code == 200
    assert sum('"choices"' in event for event in events) >= 2
    error = json.loads(events[-3].removeprefix("data: "))["error"]
    assert error["code"] == "internal_error"
    assert "division" not in error["message"]
    assert response.headers["x-request-id"] in error["message"]
    assert events[-2:] == ["data: [DONE]", ""]
    assert app.state.engine.num_open == 0


def test_a_choice_that_fails_is_a_500_or_an_error_event(make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app(fail_after=2)) as client:
        assert complete(client).status_code == 500
        streamed = complete(client, stream=True).text.split("\n\n")
    assert '"error"' in streamed[-3]
    assert streamed[-2] == "data: [DONE]"


def test_a_full_queue_is_a_429_that_says_when_to_come_back(make_app: Callable[..., FastAPI]) -> None:
    app = make_app(max_open=0)
    with TestClient(app) as client:
        response = complete(client)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "1"


def test_when_a_later_prompt_is_refused_the_earlier_ones_are_let_go(make_app: Callable[..., FastAPI]) -> None:
    app = make_app(max_open=2)
    with TestClient(app) as client:
        assert complete(client, prompt=["a", "b", "c"]).status_code == 429
        assert app.state.engine.num_open == 0


@pytest.mark.parametrize(("given", "is_kept"), [("abc-1", True), ("a" * 65, False), ("a b", False), ("x%0ay", False)])
def test_a_request_id_is_reflected_only_if_harmless(client: TestClient, given: str, is_kept: bool) -> None:
    response = client.get("/health", headers={"x-request-id": given})
    assert (response.headers["x-request-id"] == given) == is_kept


def test_a_users_line_break_never_makes_a_second_log_line(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="recontrol.access"):
        complete(client, user="me\nFAKE LINE\x1b[31m")
    (record,) = [r for r in caplog.records if r.name == "recontrol.access"]
    assert "\n" not in record.getMessage()
    assert "\x1b" not in record.getMessage()


def test_echoed_log_probabilities_are_capped_over_tokens_choices_and_alternatives(client: TestClient) -> None:
    body = {"prompt": [5] * 4000, "echo": True, "max_tokens": 0}
    assert complete(client, **body, logprobs=20).status_code == 200
    assert_refused(client, complete(client, **body, logprobs=20, n=64), "logprobs")
    assert complete(client, **body, n=64).status_code == 200


@pytest.mark.parametrize(
    "media_type", [None, "", "text/plain", "application/x-www-form-urlencoded", "application/jsonx"]
)
def test_a_body_that_is_not_called_json_is_a_415(client: TestClient, media_type: str | None) -> None:
    headers = {} if media_type is None else {"content-type": media_type}
    response = client.post("/v1/completions", content=b'{"model": "fake", "prompt": "hi"}', headers=headers)
    assert response.status_code == 415
    assert response.json()["error"]["code"] == "unsupported_media_type"


@pytest.mark.parametrize("media_type", ["application/json", "Application/JSON; charset=utf-8", "application/json ;x=y"])
def test_json_may_be_called_so_in_any_spelling(client: TestClient, media_type: str) -> None:
    content = b'{"model": "fake", "prompt": "hi"}'
    assert client.post("/v1/completions", content=content, headers={"content-type": media_type}).status_code == 200


@pytest.mark.parametrize("length", ["-1", "abc", "9" * 5000])
def test_a_length_that_is_none_is_a_413(client: TestClient, length: str) -> None:
    response = client.post("/v1/completions", content=b"{}", headers={"content-length": length})
    assert response.status_code == 413


async def test_a_client_that_goes_before_its_body_is_whole_is_answered_nothing_and_asks_for_nothing(
    make_app: Callable[..., FastAPI], caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app()
    asked: list[Any] = []
    app.state.engine.generate = asked.append
    received = [{"type": "http.request", "body": b'{"model": "fa', "more_body": True}, {"type": "http.disconnect"}]
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return received.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions",
             "query_string": b"", "headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
             "scheme": "http", "http_version": "1.1", "root_path": ""}  # fmt: skip
    await app(scope, receive, send)
    assert (sent, asked) == ([], [])
    assert not [record for record in caplog.records if record.exc_info]


def test_headers_that_are_too_large_are_a_431_in_our_body(client: TestClient) -> None:
    for response in (client.get("/health", headers={"x": "a" * 33_000}), client.get("/health?" + "a" * 33_000)):
        assert (response.status_code, response.json()["error"]["code"]) == (431, "headers_too_large")


def test_a_method_that_is_not_allowed_is_told_with_those_that_are(client: TestClient) -> None:
    response = client.delete("/v1/completions")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
