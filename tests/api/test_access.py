"""Keys, what each may use, and what only a management key may do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import ValidationError
from starlette.testclient import TestClient

from server.api.gate.keys import KeyRing
from server.api.gate.limits import Caller, Limits, LocalRates
from server.errors import ConfigurationError, InvalidRequestError, RateLimitError
from server.settings import Settings
from tests.api.conftest import chat, complete, eventually, serving

KEY, OTHER, MANAGER = "k-first-0123456789", "k-second-0123456789", "k-manager-0123456789"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def keyed(make_app: Callable[..., FastAPI]) -> Callable[..., TestClient]:
    def make(key: str | None = KEY, **settings: Any) -> TestClient:
        settings = {"api_keys": f"{KEY},{OTHER}", "management_keys": MANAGER, **settings}
        return TestClient(make_app(settings=settings), headers=bearer(key) if key else {})

    return make


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_only_what_tells_that_the_server_lives_is_public(keyed: Callable[..., TestClient], path: str) -> None:
    doubled = "http://testserver/"  # whole, since a client takes what follows two slashes for a host
    with keyed(None) as client:
        assert client.get(path).status_code == 200
        for closed in ("/metrics", "/version", "/v1/models", "/openapi.json", "/nope", f"{doubled}{path}", f"{path}/"):
            response = client.get(closed)
            assert response.status_code == 401, closed
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"


def test_metrics_are_public_when_told_so(keyed: Callable[..., TestClient]) -> None:
    with keyed(None, public_metrics=True) as client:
        assert client.get("/metrics").status_code == 200
        assert client.get("/v1/models").status_code == 401


@pytest.mark.parametrize(
    ("key", "status", "told"), [(None, 401, "management key"), (KEY, 401, "does not open"), (MANAGER, 200, "")]
)
def test_metrics_are_the_operators_and_no_callers(
    keyed: Callable[..., TestClient], key: str | None, status: int, told: str
) -> None:
    """Where little is asked, a caller would read from them what another one asked."""
    with keyed(key) as client:
        for path in ("/metrics", "/%6detrics"):
            response = client.get(path)
            assert (response.status_code, told in response.text) == (status, True)


@pytest.mark.parametrize("key", [None, KEY, MANAGER])
def test_a_line_end_behind_a_path_opens_none(keyed: Callable[..., TestClient], key: str | None) -> None:
    """Routes' patterns would match it, with the key of another path."""
    with keyed(key) as client:
        for method, path in (("GET", "/metrics"), ("GET", "/v1/models"), ("GET", "/health"), ("POST", "/v1/heads")):
            response = client.request(method, f"{path}%0A")
            assert response.status_code == (404 if key == KEY else 401), path


def test_without_a_management_key_a_closed_servers_metrics_are_nobodys(make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app(settings={"api_keys": KEY}), headers=bearer(KEY)) as client:
        assert client.get("/metrics").status_code == 401
    with TestClient(make_app()) as client:
        assert client.get("/metrics").status_code == 200


@pytest.mark.parametrize("key", [KEY, OTHER])
def test_any_of_several_keys_opens_the_server(keyed: Callable[..., TestClient], key: str) -> None:
    with keyed(key) as client:
        assert complete(client).status_code == 200
        assert client.get("/v1/models").status_code == 200


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", f"Basic {KEY}", KEY, f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Bearer {MANAGER}"],
)
def test_anything_else_does_not(keyed: Callable[..., TestClient], header: str) -> None:
    with keyed(None) as client:
        response = client.post("/v1/completions", json={}, headers={"Authorization": header})
        assert response.status_code == 401
        assert "Bearer <key>" in response.json()["error"]["message"] or "does not open" in response.text


def test_two_authorization_headers_are_not_one_too_many_to_be_wrong(keyed: Callable[..., TestClient]) -> None:
    with keyed(None) as client:
        headers = [("Authorization", f"Bearer {KEY}"), ("Authorization", "Bearer other")]
        assert client.get("/v1/models", headers=headers).status_code == 401


def test_a_body_is_not_read_before_the_key_is_known(keyed: Callable[..., TestClient]) -> None:
    with keyed(None) as client:
        assert client.post("/v1/completions", content=b" " * 200_000).status_code == 401


def test_keys_come_from_a_file_as_they_are_or_as_digests(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n{KEY}\n\nsha256:{hashlib.sha256(OTHER.encode()).hexdigest()}\n")
    ring = KeyRing.load(None, file, setting="api_keys")
    assert ring.find(KEY.encode()) == hashlib.sha256(KEY.encode()).hexdigest()[:12]
    assert ring.find(OTHER.encode())
    assert ring.find(b"") is ring.find(b"# ours") is ring.find(KEY.upper().encode()) is None


@pytest.mark.parametrize("text", ["", "# nothing\n\n", "sha256:abc\n", "a key\n", "clé\n"])
def test_a_file_of_keys_that_holds_none_or_a_bad_one_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match="api_keys") as caught:
        KeyRing.load(None, file, setting="api_keys")
    assert "clé" not in str(caught.value)
    with pytest.raises(ConfigurationError, match="cannot read"):
        KeyRing.load(None, tmp_path / "none", setting="api_keys")


@pytest.mark.parametrize("setting", ["api_keys", "inspect_keys", "management_keys"])
@pytest.mark.parametrize(("key", "is_told"), [("a" * 15, True), ("a" * 16, False), (f"sha256:{'0' * 64}", False)])
def test_a_key_that_can_be_guessed_is_warned_of_and_never_shown(
    setting: str, key: str, is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    KeyRing.load(key, None, setting=setting)
    assert (f"{setting}: key 1: it has 15 characters and can be guessed" in caplog.text) == is_told
    assert key not in caplog.text


def test_an_empty_list_of_keys_never_leaves_the_server_open(make_app: Callable[..., FastAPI]) -> None:
    for empty in ("", " , "):
        with pytest.raises(ConfigurationError, match="there is none"):
            make_app(settings={"api_keys": empty})


def test_a_key_for_both_callers_and_management_is_refused(make_app: Callable[..., FastAPI]) -> None:
    with pytest.raises(ConfigurationError, match="management_keys"):
        make_app(settings={"api_keys": KEY, "management_keys": f"{MANAGER} {KEY}"})


def test_keys_allow_another_address_than_loopback_and_are_never_printed() -> None:
    with pytest.raises(ValidationError, match="no keys are set"):
        Settings(host="0.0.0.0")
    settings = Settings(host="0.0.0.0", api_keys=KEY)  # type: ignore[arg-type]
    assert KEY not in settings.model_dump_json() + repr(settings)


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


async def test_a_rate_is_a_minutes_worth_at_once_and_then_as_it_fills() -> None:
    clock = Clock()
    caller = Caller("k", Limits(requests_per_minute=2), LocalRates(clock))
    for _ in range(2):
        await caller.begin()
    with pytest.raises(RateLimitError) as caught:
        await caller.begin()
    assert caught.value.retry_after_s == 30
    clock.now_s += 29
    with pytest.raises(RateLimitError):
        await caller.begin()
    clock.now_s += 1
    await caller.begin()
    assert caller.num_running == 3


async def test_tokens_that_were_paid_for_and_not_used_are_given_back_once() -> None:
    caller = Caller("k", Limits(tokens_per_minute=100), LocalRates(Clock()))
    charge = await caller.pay(90)
    with pytest.raises(RateLimitError) as caught:
        await caller.pay(40)
    assert caught.value.retry_after_s == 18
    charge.settle(10)
    charge.settle(10)
    await caller.pay(90)
    with pytest.raises(RateLimitError):
        await caller.pay(1)
    with pytest.raises(InvalidRequestError, match="101"):
        await caller.pay(101)


async def test_what_was_paid_for_reading_is_part_of_the_price() -> None:
    caller = Caller("k", Limits(tokens_per_minute=100), LocalRates(Clock()))
    reading = await caller.pay_reading(64 * 30)
    charge = await caller.pay(80, paid=reading)
    assert charge.tokens == 80
    with pytest.raises(RateLimitError):
        await caller.pay(21)
    charge.settle(10)
    assert (await caller.pay(90)).tokens == 90


async def test_a_reading_that_costs_more_than_the_tokens_is_given_back_at_the_end() -> None:
    caller = Caller("k", Limits(tokens_per_minute=100), LocalRates(Clock()))
    charge = await caller.pay(10, paid=await caller.pay_reading(64 * 60))
    assert charge.tokens == 60
    charge.settle(10)
    assert (await caller.pay(90)).tokens == 90


def test_what_is_refused_after_it_was_read_has_cost_its_reading(keyed: Callable[..., TestClient]) -> None:
    with keyed(tokens_per_minute=1000) as client:
        long = "a" * 64 * 400
        codes = [complete(client, prompt=long, max_tokens=1).status_code for _ in range(3)]
        assert codes == [400, 400, 429]


async def test_who_left_open_how_many_tokens_gets_what_the_minute_has_left() -> None:
    caller = Caller("k", Limits(tokens_per_minute=100), LocalRates(Clock()))
    first = await caller.pay(8000, least=20)
    assert first.tokens == 100
    first.settle(70)
    assert (await caller.pay(8000, least=20)).tokens == 30
    with pytest.raises(RateLimitError) as caught:
        await caller.pay(8000, least=20)
    assert caught.value.retry_after_s == 12
    with pytest.raises(InvalidRequestError, match="101"):
        await caller.pay(8000, least=101)
    assert (await Caller("k", Limits(), LocalRates(Clock())).pay(8000, least=20)).tokens == 8000


def test_each_key_has_its_own_rate(keyed: Callable[..., TestClient]) -> None:
    with keyed(requests_per_minute=2) as client:
        assert [complete(client).status_code for _ in range(3)] == [200, 200, 429]
        refused = complete(client)
        assert 1 <= int(refused.headers["retry-after"]) <= 30
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        client.headers["authorization"] = f"Bearer {OTHER}"
        assert complete(client).status_code == 200


def test_tokens_are_counted_as_they_are_used_whatever_was_asked_for(keyed: Callable[..., TestClient]) -> None:
    with keyed(tokens_per_minute=70) as client:
        text = complete(client, max_tokens=30, seed=1).json()["choices"][0]["text"]
        stopped = {"max_tokens": 20, "seed": 1, "stop": text[0]}
        # 35 of 70 are used; each of these must be able to pay for 25, but uses 6.
        assert [complete(client, **stopped).status_code for _ in range(3)] == [200, 200, 429]
        assert complete(client, max_tokens=70).status_code == 400


def test_a_chat_that_leaves_its_length_open_gets_what_the_minute_has_left(keyed: Callable[..., TestClient]) -> None:
    with keyed(tokens_per_minute=300) as client:
        assert complete(client, max_tokens=95).json()["usage"]["total_tokens"] == 100
        # Refused, and read for two tokens.
        assert complete(client, max_tokens=300).status_code == 400
        done = chat(client, n=2)
        usage = done.json()["usage"]
        assert {choice["finish_reason"] for choice in done.json()["choices"]} == {"length"}
        assert usage["completion_tokens"] == (198 - usage["prompt_tokens"]) // 2 * 2
        assert chat(client).status_code == 429


def test_requests_at_once_are_limited_for_each_key_and_counted_out_when_they_end(
    make_app: Callable[..., FastAPI],
) -> None:
    app = make_app(settings={"api_keys": f"{KEY} {OTHER}", "concurrent_requests": 1}, token_delay_s=0.02)
    body = {"model": "fake", "prompt": "hi", "max_tokens": 4000, "stream": True}
    short = {**body, "max_tokens": 1}
    with serving(app) as url, httpx.Client(base_url=url, headers=bearer(KEY)) as client:
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()  # kept: httpx hangs up when the iterator is dropped
            next(lines)
            refused = client.post("/v1/completions", json=short)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert client.post("/v1/completions", json=short, headers=bearer(OTHER)).status_code == 200
            assert client.get("/v1/models").status_code == 200
        assert eventually(lambda: client.post("/v1/completions", json=short).status_code == 200)
        assert client.post("/v1/completions", json={}).status_code == 400
        assert client.post("/v1/completions", json=short).status_code == 200


@pytest.fixture
def manager(keyed: Callable[..., TestClient]) -> Iterator[TestClient]:
    with keyed(MANAGER) as client:
        yield client


def head_names(response: Any) -> list[str]:
    assert response.status_code == 200, response.text
    return [head["id"] for head in response.json()["data"]]


def test_heads_are_loaded_reloaded_and_unloaded_without_a_restart(manager: TestClient) -> None:
    url = "/v1/management/heads"
    assert head_names(manager.post(f"{url}/kind/load")) == ["positive", "plain", "kind"]
    assert manager.post(f"{url}/kind/load").status_code == 409
    assert head_names(manager.post(f"{url}/kind/reload")) == ["positive", "plain", "kind"]
    caller = {"headers": bearer(KEY)}
    assert manager.get("/v1/models", **caller).json()["data"][-1]["id"] == "fake@kind"
    body = {"model": "fake@kind", "prompt": "hi"}
    assert manager.post("/v1/completions", json=body, **caller).status_code == 200
    assert 'recontrol_controlled_tokens_total{head="kind",model_name="fake"} 16.0' in manager.get("/metrics").text
    assert head_names(manager.post(f"{url}/kind/unload")) == ["positive", "plain"]
    assert manager.post("/v1/completions", json=body, **caller).status_code == 404
    for action in ("reload", "unload"):
        assert manager.post(f"{url}/kind/{action}").status_code == 404


@pytest.mark.parametrize("name", ["nobody", "..%2fplain", "%2fetc%2fpasswd", "..", "a b"])
def test_a_head_to_load_is_a_name_that_lies_in_the_folder(manager: TestClient, name: str) -> None:
    for action in ("load", "reload", "unload"):
        assert manager.post(f"/v1/management/heads/{name}/{action}").status_code == 404


@pytest.mark.parametrize("key", [None, KEY, "wrong"])
def test_management_needs_its_own_key(keyed: Callable[..., TestClient], key: str | None) -> None:
    with keyed(key) as client:
        assert client.post("/v1/management/heads/plain/unload").status_code == 401
        client.headers["authorization"] = f"Bearer {KEY}"
        assert [head["id"] for head in client.get("/v1/heads").json()["data"]] == ["positive", "plain"]


def test_without_a_management_key_there_is_no_management(make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app()) as client:
        assert client.post("/v1/management/heads/plain/unload").status_code == 404
        assert "/v1/management" not in client.get("/openapi.json").text
    with TestClient(make_app(settings={"api_keys": KEY}), headers=bearer(KEY)) as client:
        assert client.post("/v1/management/heads/plain/unload").status_code == 401


def test_with_a_management_key_alone_callers_need_none_and_managers_do(make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app(settings={"management_keys": MANAGER})) as client:
        assert complete(client).status_code == 200
        assert client.post("/v1/management/heads/kind/load").status_code == 401
        assert client.post("/v1/management/heads/kind/load", headers=bearer(MANAGER)).status_code == 200


def test_a_pinned_head_is_not_unloaded(keyed: Callable[..., TestClient]) -> None:
    pinned = json.dumps({"objective": {"weights": {"plain": 1.0}}})
    with keyed(MANAGER, pinned_control=pinned) as client:
        assert client.post("/v1/management/heads/plain/unload").status_code == 409


def salts(make_app: Callable[..., FastAPI], settings: dict[str, Any], *headers: dict[str, str]) -> list[str]:
    """Those of the engine's requests, one for each request with such headers."""
    app, seen = make_app(settings=settings), []
    generate = app.state.engine.generate
    app.state.engine.generate = lambda request: (seen.append(request.cache_salt), generate(request))[1]
    with TestClient(app) as client:
        for given in headers:
            client.headers = httpx.Headers(given)
            assert complete(client).status_code == 200
    return seen


NAMED = {"cache_salt_header": "x-tenant"}


def test_behind_a_gateway_cached_prompts_are_shared_by_callers_of_one_name(make_app: Callable[..., FastAPI]) -> None:
    given = [{"x-tenant": "a"}, {"x-tenant": "b"}, {"x-tenant": "a"}, {}, {}]
    a, b, again, none, neither = salts(make_app, NAMED, *given)
    assert a == again
    assert len({a, b, none, neither}) == 4


def test_a_name_is_one_within_a_key_alone(make_app: Callable[..., FastAPI]) -> None:
    both = [{**bearer(key), "x-tenant": "a"} for key in (KEY, OTHER)]
    first, second = salts(make_app, {**NAMED, "api_keys": f"{KEY},{OTHER}"}, *both)
    assert first != second


def test_without_keys_a_server_for_others_shares_no_cached_prompts_unless_callers_are_named(
    make_app: Callable[..., FastAPI],
) -> None:
    # An id that a caller chooses must not make it another one.
    alike = [{"x-request-id": "a"}] * 2
    first, second = salts(make_app, {"host": "0.0.0.0", "allow_public_bind": True}, *alike)
    assert first != second
    own, own_again = salts(make_app, {}, {}, {})
    assert own == own_again


@pytest.mark.parametrize(
    ("trusted", "address"), [((), "127.0.0.1"), (("10.0.0.0/8",), "127.0.0.1"), (("127.0.0.0/8",), "192.0.2.7")]
)
def test_where_a_request_comes_from_is_believed_of_trusted_proxies_alone(
    make_app: Callable[..., FastAPI], trusted: tuple[str, ...], address: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "recontrol.access"), serving(make_app(), trusted_proxies=trusted) as url:
        assert httpx.get(f"{url}/health", headers={"x-forwarded-for": "192.0.2.7"}).status_code == 200
    assert caplog.records[0].fields["client"] == address  # type: ignore[attr-defined]


@pytest.mark.parametrize("given", ["*", "localhost", "10.0.0.0/33", "1.2.3"])
def test_a_trusted_proxy_is_an_address_or_a_network(given: str) -> None:
    with pytest.raises(ValidationError, match="no IP address"):
        Settings(trusted_proxies=given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "a" * 6400}),
        ("/detokenize", {"tokens": [100] * 1600}),
        ("/v1/completions", {"model": "fake", "prompt": "a" * 6400}),
        ("/v1/value", {"model": "fake", "input": "a" * 6400}),
    ],
)
def test_no_text_is_read_for_a_key_that_has_no_tokens_left_for_that(
    make_app: Callable[..., FastAPI], path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app(settings={"tokens_per_minute": 150})
    with TestClient(app) as client:
        assert client.post("/tokenize", json={"prompt": "a" * 6400}).status_code == 200
        for name in ("encode", "decode"):
            monkeypatch.setattr(app.state.engine, name, lambda *_, **__: pytest.fail("read"))
        refused = client.post(path, json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert int(refused.headers["retry-after"]) > 10
