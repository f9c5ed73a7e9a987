"""Bodies that once reached an engine or a tokenizer they should not have, and streams that differed from the whole."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from server.engines.fake import FakeEngine
from server.types import TokenLogprob, TopLogprob
from tests.api.conftest import chat, complete


def post(client: TestClient, path: str, body: dict[str, Any]) -> Any:
    """Escaped as ASCII, so that half a surrogate pair can be sent."""
    content = json.dumps({"model": "fake", **body}).encode()
    return client.post(path, content=content, headers={"content-type": "application/json"})


@pytest.mark.parametrize("prompt", [[300], [-1], [[2**63]], [[104], [256]]])
def test_echo_never_decodes_token_ids_outside_the_vocabulary(client: TestClient, prompt: Any) -> None:
    response = complete(client, prompt=prompt, echo=True)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"
    assert "0 to 255" in response.json()["error"]["message"]


@pytest.mark.parametrize("fields", [{"prompt": "\ud800"}, {"prompt": ["a", "\ud800"]}, {"stop": "\ud800"}])
def test_half_a_surrogate_pair_is_refused(client: TestClient, fields: dict[str, Any]) -> None:
    response = post(client, "/v1/completions", {"prompt": "hi", **fields})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == next(iter(fields))


def test_half_a_surrogate_pair_in_a_message_is_refused(client: TestClient) -> None:
    for content in ("\ud800", [{"type": "text", "text": "\ud800"}]):
        response = post(client, "/v1/chat/completions", {"messages": [{"role": "user", "content": content}]})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "messages.0.content.0.text"


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"\ud800": 1}),
        ("/v1/completions", {f"\ud800{i}": 1 for i in range(200)}),
        ("/v1/completions", {"prompt": "x", "control": {"\ud800": 1}}),
        ("/v1/responses", {"input": [{"type": "\ud800"}]}),
        ("/v1/responses", {"input": [{"\ud800": 1, "role": "user"}]}),
        ("/tokenize", {"prompt": "x", "tools": [{"type": "\ud800"}]}),
    ],
)
def test_half_a_surrogate_pair_in_a_name_is_told_without_it(client: TestClient, path: str, fields: Any) -> None:
    response = post(client, path, fields)
    assert response.status_code == 400
    assert response.json()["error"]["message"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
def test_a_body_whose_parts_are_not_counted_is_refused(client: TestClient, encoding: str) -> None:
    """Python reads more encodings than JSON has, and marks are counted in UTF-8."""
    text = '{"model": "fake", "prompt": "\\"", "user": "a", "max_tokens": 1}'
    headers = {"content-type": "application/json"}
    assert client.post("/v1/completions", content=text.encode("utf-8-sig"), headers=headers).status_code == 200
    response = client.post("/v1/completions", content=text.encode(encoding), headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")


@pytest.mark.parametrize("content", [[], [{"type": "text", "text": "x"}] * 1025])
def test_a_message_has_a_bounded_number_of_parts(client: TestClient, content: Any) -> None:
    response = chat(client, messages=[{"role": "user", "content": content}])
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages.0.content"


def test_every_streamed_choice_echoes_its_prompts_log_probabilities(client: TestClient) -> None:
    options = {"prompt": ["hi", "hello"], "n": 2, "echo": True, "logprobs": 1, "max_tokens": 2, "seed": 1}
    whole = {choice["index"]: choice["logprobs"] for choice in complete(client, **options).json()["choices"]}
    joined: dict[int, dict[str, list[Any]]] = {}
    for line in complete(client, stream=True, **options).text.split("\n\n")[:-2]:
        (choice,) = json.loads(line.removeprefix("data: "))["choices"]
        for key, values in choice["logprobs"].items():
            joined.setdefault(choice["index"], {}).setdefault(key, []).extend(values)
    assert joined == whole


@pytest.mark.parametrize(
    ("path", "fields", "name", "allowed"),
    [
        ("/v1/completions", {"prompt": "x", "logit_biases": {}}, "logit_biases", "prompt, logprobs, echo"),
        ("/v1/completions", {"prompt": "x", "stream_options": {"x": 1}}, "stream_options.x", "include_usage, contin"),
        (
            "/v1/completions",
            {"prompt": "x", "control": {"objective": {"weights": {"plain": 1.0}}, "gates": 1}},
            "control.gates",
            "objective, step_size, steps, max_kl, max_shift, max_response_kl, phase, in_calls, gate, window, schedule",
        ),
        (
            "/v1/completions",
            {"prompt": "x", "control": {"objective": {"type": "target", "values": {"plain": 1.0}, "weights": {}}}},
            "control.objective.weights",
            "type, values, unit.",
        ),
        (
            "/v1/completions",
            {
                "prompt": "x",
                "control": {
                    "objective": {"weights": {"plain": 1.0}},
                    "schedule": {"type": "exponential", "half_life": 3.0, "to": 0.5},
                },
            },
            "control.schedule.to",
            "type, half_life.",
        ),
        (
            "/v1/completions",
            {"prompt": "x", "control": {"objective": {"weights": {"plain": 1.0}, "x": 1}}},
            "control.objective.x",
            "type, weights.",
        ),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x", "z": 1}]}, "messages.0.z", "role, con"),
        ("/v1/responses", {"input": [{"type": "reasoning", "z": 1}]}, "input.0.z", "summary, content"),
        ("/v1/responses", {"input": "x", "text": {"format": {"type": "text", "z": 1}}}, "text.format.z", "type."),
    ],
)
def test_an_unknown_field_is_named_with_those_allowed_in_its_place(
    client: TestClient, path: str, fields: dict[str, Any], name: str, allowed: str
) -> None:
    error = post(client, path, fields).json()["error"]
    assert error["param"] == name
    assert error["message"].startswith(f"{name}: there is no such field. Allowed here: ")
    assert allowed in error["message"]


def test_an_error_sends_back_no_more_than_the_beginning_of_a_name(client: TestClient) -> None:
    assert len(post(client, "/v1/completions", {"prompt": "x", "x" * 50_000: 1}).content) < 1000
    assert len(post(client, "/v1/completions", {"prompt": "x", "max_tokens": 10**4000}).content) < 1000


@pytest.mark.parametrize("host", ["[", "a/b?#", "evil.example"])
def test_nothing_in_a_response_comes_from_the_host_header(make_app: Callable[..., FastAPI], host: str) -> None:
    # With keys any host is answered.
    headers = {"host": host, "authorization": "Bearer a-key"}
    with TestClient(make_app(settings={"api_keys": "a-key"})) as client:
        response = client.get("/health/", headers=headers, follow_redirects=False)
    assert response.status_code == 404
    assert response.json()["error"]["message"] == "There is no GET /health/. `GET /openapi.json` has all paths."


def test_the_openapi_document_names_our_error_body_and_no_status_that_is_never_sent(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    for operations in document["paths"].values():
        for operation in operations.values():
            assert {"4XX", "5XX"} < set(operation["responses"])
            assert "422" not in operation["responses"]


def test_a_log_probability_of_minus_infinity_is_still_json(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    impossible = TokenLogprob(101, "e", float("-inf"), (TopLogprob(101, "e", float("-inf")),))
    monkeypatch.setattr(FakeEngine, "_logprob", lambda *_: impossible)
    for stream in (False, True):
        assert "-9999.0" in complete(client, logprobs=1, stream=stream).text
        response = chat(client, logprobs=True, top_logprobs=1, stream=stream)
        assert "-9999.0" in response.text
        assert "Infinity" not in response.text
