"""POST /v1/value over HTTP: what it tells, what it refuses, and the gate it shares with the rest."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fastapi import FastAPI
from starlette.testclient import TestClient
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from server.types import GenerationRequest, PromptValues
from tests.api.conftest import complete, eventually, serving
from tests.api.test_metrics import scrape
from tests.conftest import byte_tokenizer
from value_models.heads import ValueHead

KEY = "Key-0123456789abcdef"
MESSAGES = [{"role": "user", "content": "hello"}]
ANSWERED = [*MESSAGES, {"role": "assistant", "content": "good day"}]


def score(client: Any, **body: Any) -> httpx.Response:
    """Escaped as ASCII, so that half a surrogate pair can be sent."""
    content = json.dumps({"model": "fake", **({} if "messages" in body else {"input": "hello"}), **body})
    return client.post("/v1/value", content=content.encode(), headers={"content-type": "application/json"})


def data_of(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    return response.json()["data"]


def state_of(datum: dict[str, Any]) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(datum["hidden_state"], validate=True), "<f4").copy())


# ---- what it tells, over a tiny random model


@pytest.fixture
def embedded(make_embedded_app: Callable[..., FastAPI]) -> Iterator[TestClient]:
    with TestClient(make_embedded_app()) as client:
        yield client


def states_by_transformers(model_folder: Callable[..., Path], token_ids: list[int]) -> torch.Tensor:
    plain = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32)
    with torch.inference_mode():
        return plain.get_decoder()(torch.tensor([token_ids])).last_hidden_state[0]


def test_it_gives_heads_values_of_transformers_own_last_state_and_that_state(
    embedded: TestClient, model_folder: Callable[..., Path], heads: dict[str, ValueHead]
) -> None:
    text = "The soup was cold, and nobody cared."
    body = {"model": "tiny", "input": text, "per_token": True, "hidden_state": "last"}
    (datum,) = data_of(score(embedded, **body))
    states_TD = states_by_transformers(model_folder, byte_tokenizer()(text)["input_ids"])
    assert torch.allclose(state_of(datum), states_TD[-1], rtol=1e-3, atol=1e-4)
    for name, head in (("positive", heads["good"]), ("plain", heads["line"])):
        expected_T = head.value(states_TD)
        assert torch.allclose(torch.tensor(datum["token_values"][name]), expected_T, rtol=1e-3, atol=1e-3)
        assert datum["values"][name] == datum["token_values"][name][-1]
        assert head.value(state_of(datum)[None]).item() == pytest.approx(datum["values"][name], rel=1e-4)
    assert "".join(datum["tokens"]) == text


def test_a_value_is_the_one_before_control_of_a_generations_first_token(embedded: TestClient) -> None:
    control = {"objective": {"weights": {"positive": 1.0, "plain": 0.5}}}
    for fields in ({"input": "Tell me more"}, {"messages": MESSAGES}):
        path = "/v1/chat/completions" if "messages" in fields else "/v1/completions"
        prompt = {"messages": MESSAGES} if "messages" in fields else {"prompt": fields["input"]}
        body = {"model": "tiny", "max_tokens": 1, "control": control, **prompt}
        drawn = embedded.post(path, json=body).json()["choices"][0]["control"]["value_before"]
        (datum,) = data_of(score(embedded, model="tiny", **fields))
        assert datum["values"] == pytest.approx(drawn, rel=1e-5)


def test_a_chat_that_ends_with_an_answer_is_read_behind_that_answers_text(embedded: TestClient) -> None:
    def values(**fields: Any) -> dict[str, float]:
        return data_of(score(embedded, model="tiny", **fields))[0]["values"]

    assert values(messages=ANSWERED) == values(input="user: hello\nassistant: good day")
    assert values(messages=MESSAGES) == values(input="user: hello\nassistant: ")
    # An answer that is still empty is one that is about to begin.
    assert values(messages=[*MESSAGES, {"role": "assistant", "content": ""}]) == values(messages=MESSAGES)


def test_alone_equals_among_others_and_beside_generation(embedded: TestClient) -> None:
    texts = [f"{'word ' * i}number {i}" for i in range(1, 9)]
    alone = [data_of(score(embedded, model="tiny", input=text))[0]["values"] for text in texts]
    together = data_of(score(embedded, model="tiny", input=texts, per_token=True))
    assert [datum["values"] for datum in together] == alone
    assert [datum["index"] for datum in together] == list(range(8))

    def ask(index: int) -> Any:
        if index % 2:
            return data_of(score(embedded, model="tiny", input=texts[index // 2]))[0]["values"]
        body = {"model": "tiny@positive", "prompt": texts[index // 2], "max_tokens": 12, "seed": index}
        return embedded.post("/v1/completions", json=body).json()["choices"]

    quiet = [ask(index) for index in range(12)]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, range(12))) == quiet


def test_a_head_that_is_unloaded_scores_no_more(make_embedded_app: Callable[..., FastAPI]) -> None:
    app = make_embedded_app(management_keys=KEY)
    with TestClient(app, headers={"Authorization": f"Bearer {KEY}"}) as client:
        assert client.post("/v1/management/heads/plain/unload").status_code == 200
        (datum,) = data_of(score(client, model="tiny"))
        assert list(datum["values"]) == ["positive"]
        assert score(client, model="tiny", heads=["plain"]).status_code == 404


# ---- what it takes and refuses, over the fake engine


def test_every_form_of_input_is_scored_with_every_head_by_default(client: TestClient) -> None:
    for given, count in [("hi", 1), (["hi", "ho"], 2), ([104, 105], 1), ([[104, 105], [106]], 2)]:
        body = score(client, input=given).json()
        assert body["object"] == "list"
        assert [list(datum["values"]) for datum in body["data"]] == [["positive", "plain"]] * count
        assert all(set(datum) == {"object", "index", "values"} for datum in body["data"])
    assert score(client, input="hi").json()["data"] == score(client, input=[104, 105]).json()["data"]
    assert score(client, input=["hi", "hello"]).json()["usage"] == {"prompt_tokens": 7, "total_tokens": 7}


def test_one_chat_or_several_are_scored(client: TestClient) -> None:
    one, other = (data_of(score(client, messages=chat))[0]["values"] for chat in (MESSAGES, ANSWERED))
    assert one != other
    assert [datum["values"] for datum in data_of(score(client, messages=[MESSAGES, ANSWERED]))] == [one, other]
    assert data_of(score(client, input="user: hello\nassistant: good day"))[0]["values"] == other


def test_heads_are_told_in_the_order_asked_and_a_model_id_may_choose_one(client: TestClient) -> None:
    (both,), (one,) = (data_of(score(client, heads=heads)) for heads in (["plain", "positive"], ["plain"]))
    assert list(both["values"]) == ["plain", "positive"]
    assert data_of(score(client, model="fake@plain")) == [one]
    error = score(client, model="fake@plain", heads=["plain"]).json()["error"]
    assert (error["param"], error["code"]) == ("heads", "invalid_value")


def test_the_state_alone_can_be_asked_for(client: TestClient) -> None:
    (datum,) = data_of(score(client, heads=[], hidden_state="last"))
    assert datum["values"] == {}
    assert state_of(datum).shape == (4,)


def test_null_is_the_default_of_every_field(client: TestClient) -> None:
    fields = dict.fromkeys(("heads", "per_token", "hidden_state", "messages", "user", "timeout_s"))
    assert score(client, **fields, input="hello").json()["data"] == score(client).json()["data"]


TOO_LONG = "x" * 4097
BAD = [
    *[("input", {"input": given}) for given in
      ["", [], [[]], [""], ["a", ""], [[104], []], [300], [-1], [[2**63]], [1.5], [True], 7, {"a": 1}, "\ud800",
       ["a", "\ud800"], ["x"] * 65, ["a", 1], TOO_LONG, [[104], [104] * 4097]]],
    *[("messages", {"messages": given}) for given in [[], "hi", [MESSAGES] * 65]],
    ("messages.0", {"messages": [[]]}),
    ("messages.0.0", {"messages": [[MESSAGES]]}),
    ("messages.0.content", {"messages": [{"role": "user", "content": []}]}),
    ("messages.0.content.0.text", {"messages": [{"role": "user", "content": "\ud800"}]}),
    ("messages.1.0.tool_call_id", {"messages": [MESSAGES, [{"role": "tool", "content": "x"}]]}),
    ("messages.0.z", {"messages": [{"role": "user", "content": "x", "z": 1}]}),
    ("messages", {"messages": [{"role": "user", "content": TOO_LONG}]}),
    ("input", {"messages": MESSAGES, "input": "hi"}),
    ("input", {"input": None}),
    ("heads", {"heads": []}),
    ("heads", {"heads": ["plain", "plain"]}),
    ("heads", {"heads": "plain"}),
    ("heads", {"heads": ["plain"] * 9}),
    ("heads.0", {"heads": ["x" * 65]}),
    ("heads.0", {"heads": [{"plain": 1}]}),
    ("per_token", {"per_token": "yes"}),
    ("input", {"input": [[104] * 4096] * 33}),
    ("hidden_state", {"hidden_state": "first"}),
    ("hidden_state", {"hidden_state": True}),
    ("user", {"user": "x" * 257}),
    *[("timeout_s", {"timeout_s": given}) for given in [0, -1, True, 1e308]],
    ("prompt", {"prompt": "hi"}),
    ("max_tokens", {"max_tokens": 3}),
    ("control", {"control": {"objective": {"weights": {"plain": 1.0}}}}),
    ("stream", {"stream": True}),
]  # fmt: skip


@pytest.mark.parametrize(("param", "fields"), BAD)
def test_a_bad_body_is_refused_by_its_field_and_the_next_is_served(
    make_app: Callable[..., FastAPI], param: str, fields: dict[str, Any]
) -> None:
    with TestClient(make_app(settings={"max_body_bytes": 2**20})) as client:
        response = score(client, **fields)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text
        assert len(response.content) < 1000
        assert client.app.state.engine.num_open == 0  # type: ignore[attr-defined]
        assert score(client).status_code == 200


def test_values_are_capped_over_tokens_and_heads(make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app(settings={"max_body_bytes": 2**20}, heads=("a", "b", "c"))) as client:
        most = {"input": [[104] * 2048] * 64, "per_token": True}
        refused = score(client, **most)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "per_token")
        assert score(client, **{**most, "per_token": False}).status_code == 200
        assert len(data_of(score(client, **most, heads=["a", "c"]))) == 64


@pytest.mark.parametrize("name", ["nobody", "../plain", "/etc/passwd", "s3://bucket/head", "__import__('os')", "a b"])
def test_an_unknown_head_is_a_404_that_lists_the_known(client: TestClient, name: str) -> None:
    for fields in ({"heads": ["plain", name]}, {"model": f"fake@{name}"}):
        response = score(client, **fields)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (404, next(iter(fields)))
        assert "plain, positive" in error["message"]


def test_an_unknown_model_is_a_404(client: TestClient) -> None:
    assert score(client, model="other").status_code == 404


def test_an_engine_that_only_generates_says_so(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = client.app.state.engine  # type: ignore[attr-defined]
    monkeypatch.setattr(engine, "info", engine.info.__class__("fake", 4096, 256, engine.info.heads))
    response = score(client)
    assert response.status_code == 400
    assert "does not score" in response.json()["error"]["message"]


def test_a_chat_without_a_template_is_refused(
    make_embedded_app: Callable[..., FastAPI], monkeypatch: pytest.MonkeyPatch
) -> None:
    with TestClient(make_embedded_app()) as client:
        monkeypatch.setattr(PreTrainedTokenizerFast, "chat_template", None, raising=False)
        monkeypatch.delattr(client.app.state.engine._tokenizer, "chat_template", raising=False)  # type: ignore[attr-defined]
        response = score(client, model="tiny", messages=MESSAGES)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")


# ---- the gate


def test_it_needs_a_key_and_a_key_pays_for_its_tokens(make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app(settings={"api_keys": KEY, "tokens_per_minute": 20})) as client:
        assert score(client).status_code == 401
        client.headers["authorization"] = f"Bearer {KEY}"
        assert [score(client, input="123456789").status_code for _ in range(3)] == [200, 200, 429]
        too_much = score(client, input="x" * 21)
        assert (too_much.status_code, too_much.json()["error"]["param"]) == (400, "input")


def test_a_body_that_is_too_large_is_a_413(client: TestClient) -> None:
    assert score(client, input="x" * 100_001).status_code == 413


def test_a_full_queue_is_a_429_and_lets_go_of_what_was_queued(make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app(max_open=3)) as client:
        response = score(client, input=["a", "b", "c", "d"])
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert client.app.state.engine.num_open == 0  # type: ignore[attr-defined]
        assert score(client, input=["a", "b", "c"]).status_code == 200


@pytest.mark.parametrize("settings", [{}, {"request_timeout_s": 0.1}])
def test_what_takes_too_long_is_a_504(make_app: Callable[..., FastAPI], settings: dict[str, float]) -> None:
    with TestClient(make_app(settings=settings, token_delay_s=30)) as client:
        response = score(client, **({} if settings else {"timeout_s": 0.1}))
        assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert client.app.state.engine.num_open == 0  # type: ignore[attr-defined]


def test_a_client_that_leaves_frees_the_work(make_app: Callable[..., FastAPI]) -> None:
    app = make_app(token_delay_s=30)
    with serving(app) as url, httpx.Client(base_url=url) as client:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/value", json={"model": "fake", "input": ["a", "b"]}, timeout=0.3)
        assert eventually(lambda: app.state.engine.num_open == 0)


def test_a_client_that_leaves_frees_the_pages(make_embedded_app: Callable[..., FastAPI]) -> None:
    app = make_embedded_app(prefill_chunk_tokens=64, max_model_len=256)
    with serving(app) as url, httpx.Client(base_url=url) as client:
        core = app.state.engine._core
        step = core.step
        core.step = lambda: None
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/value", json={"model": "tiny", "input": ["x" * 250] * 3}, timeout=0.3)
        core.step = step
        assert eventually(lambda: not core.has_work)
        assert core.page_pool.num_held == 0
        assert len(data_of(score(client, model="tiny"))) == 1


def test_a_server_that_drains_takes_none(client: TestClient) -> None:
    client.app.state.is_draining = True  # type: ignore[attr-defined]
    assert score(client).status_code == 503


def test_prompt_tokens_and_requests_are_counted(client: TestClient) -> None:
    score(client, input=["hello", "world"])
    counts = scrape(client)
    assert counts["recontrol_prompt_tokens_total", ""] == 10
    assert counts["recontrol_request_success_total", "length"] == 2
    assert counts["recontrol_generation_tokens_total", ""] == 0


def test_an_input_that_fails_inside_is_a_500_that_says_nothing_of_the_inside(make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app(fail_after=0)) as client:
        response = score(client)
        assert (response.status_code, response.json()["error"]["code"]) == (500, "generation_failed")


def test_what_is_not_finite_is_null(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(request: GenerationRequest) -> PromptValues:
        return PromptValues({"plain": math.nan, "positive": 1.0}, {"plain": (1.0, math.inf), "positive": (0.0, 1.0)})

    monkeypatch.setattr("server.engines.fake._prompt_values", broken)
    (datum,) = data_of(score(client, input="hi", per_token=True))
    assert datum["values"] == {"plain": None, "positive": 1.0}
    assert datum["token_values"] == {"plain": [1.0, None], "positive": [0.0, 1.0]}


def test_pinned_control_neither_moves_a_value_nor_is_needed_for_one(make_app: Callable[..., FastAPI]) -> None:
    pinned = json.dumps({"objective": {"weights": {"plain": 1.0}}})
    with TestClient(make_app(settings={"pinned_control": pinned})) as steered, TestClient(make_app()) as plain:
        assert score(steered).json()["data"] == score(plain).json()["data"]
        assert complete(steered).json()["choices"][0]["control"]


def test_the_access_line_names_the_user(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="recontrol.access"):
        score(client, user="ada", input=["a", "bc"])
    (line,) = [record.getMessage() for record in caplog.records if record.name == "recontrol.access"]
    assert 'user="ada"' in line
    assert "prompts=2" in line
    assert "prompt_tokens=3" in line
