"""What happened to servers like this one, each held here. The table in docs/http-api.md names these tests."""

from __future__ import annotations

import ast
import hashlib
import hmac
import json
import logging
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from starlette.testclient import TestClient
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.api.schemas import ChatBody, CompletionBody
from server.control.params import ControlParams
from server.engines.chat_template import encode_chat
from server.engines.embedded.core import EngineCore
from server.engines.embedded.model import loader
from server.engines.text import StopMatcher
from server.errors import InvalidRequestError, ModelLoadError
from server.logs import JsonFormatter, TextFormatter
from server.settings import Settings
from server.types import GenerationRequest, SamplingParams
from tests.api.conftest import chat, complete, serving
from tests.conftest import byte_tokenizer, run

ROOT = Path(__file__).parent.parent.parent
KEY, MANAGER = "Key-0123456789", "Manager-0123456789"
JSON = {"content-type": "application/json"}


def raw(url: str, request: bytes) -> bytes:
    """What the server answers to these bytes, up to when it hangs up; b"" if it hung up at once."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=5) as connection:
        try:
            connection.sendall(request)
            answer = b""
            while chunk := connection.recv(65536):
                answer += chunk
        except ConnectionError:
            return b""
    return answer


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


@pytest.fixture
def keyed_url(make_app: Callable[..., FastAPI]) -> Iterator[str]:
    with serving(make_app(settings={"api_keys": KEY})) as url:
        yield url


@pytest.mark.parametrize("host", [b"a/health", b"a?/health", b"a#/health", b"health@a", b"a\\health", b"", b"/health?"])
@pytest.mark.parametrize(
    "target",
    [b"/v1/models", b"http://a/health", b"//health", b"/health/../v1/models", b"/health;x", b"//"],
)
def test_no_host_header_makes_a_path_public(keyed_url: str, host: bytes, target: bytes) -> None:
    """CVE-2026-48746 (vLLM): the path that needs no key was taken from the Host header."""
    answer = raw(keyed_url, b"GET " + target + b" HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n")
    assert status_of(answer) == 401


@pytest.mark.parametrize(
    "key", [b"Key-0123456789\xff", "Schlüssel".encode(), b"\xff\xfe", b"KEY-0123456789", b"key-0123456789"]
)
def test_keys_are_compared_as_bytes_in_constant_time(
    make_app: Callable[..., FastAPI], key: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CVE-2025-59425 (vLLM): keys compared with `==`; TGI's compared without regard to case."""
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def record(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return real(a, b)

    monkeypatch.setattr(hmac, "compare_digest", record)
    with TestClient(make_app(settings={"api_keys": f"{KEY} other-0123"})) as client:
        assert client.get("/v1/models", headers={"Authorization": b"Bearer " + key}).status_code == 401
    assert [(len(a), len(b)) for a, b in compared] == [(32, 32)] * 2


@pytest.mark.parametrize(
    ("version", "lengths", "status"),
    [
        (b"1.1", b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", 400),
        (b"1.1", b"transfer-encoding: chunked\r\ncontent-length: 62\r\n", 400),
        (b"1.1", b"Content-Length: 5\r\nContent-Length: 62\r\n", 400),
        (b"1.1", b"Transfer-Encoding: gzip, chunked\r\n", 400),
        (b"1.0", b"Transfer-Encoding: chunked\r\n", 400),
        (b"9.9", b"Content-Length: 62\r\n", 505),
    ],
)
def test_a_body_has_one_length_and_nothing_behind_it_is_a_request(
    make_app: Callable[..., FastAPI], version: bytes, lengths: bytes, status: int
) -> None:
    """CVE-2024-1135 and CVE-2024-6827 (gunicorn), CVE-2025-43859 (h11): smuggled requests."""
    body = b'{"model": "fake", "prompt": "hi"}'
    head = b"POST /v1/completions HTTP/" + version + b"\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    smuggled = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with serving(make_app()) as url:
        answer = raw(url, head + lengths + b"\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) + smuggled)
    assert (status_of(answer), answer.count(b"application/json")) == (status, 1)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"model": "fake", "prompt": "a", "model": "fake"}', "model"),
        (b'{"model": "fake", "prompt": "a", "control": {"max_kl": 0.1, "max_kl": 0.5}}', "max_kl"),
        (b'{"model": "fake", "prompt": "a", "\\u006dodel": "fake"}', "model"),
    ],
)
def test_a_field_that_is_given_twice_is_refused(client: TestClient, body: bytes, field: str) -> None:
    """CVE-2017-12635 (CouchDB): one reader took the first of two, the other the last."""
    answer = client.post("/v1/completions", content=body, headers=JSON)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


def test_what_a_request_line_holds_is_told_back_in_part(client: TestClient) -> None:
    for method, path in (("A" * 20_000, "/health"), ("GET", "/" + "a" * 20_000)):
        assert len(client.request(method, path).text) < 1000


@pytest.mark.parametrize("body", [{"n": 10**6}, {"n": 128, "prompt": ["a"] * 64}, {"n": 128, "max_tokens": 4000}])
def test_the_number_of_choices_is_bounded_alone_and_together(client: TestClient, body: dict[str, Any]) -> None:
    """CVE-2026-34756 (vLLM): unbounded `n`."""
    started_s = time.monotonic()
    assert complete(client, **body).status_code == 400
    assert time.monotonic() - started_s < 5


@pytest.mark.parametrize("prompt", ["", [], [[]], [""]])
def test_an_empty_prompt_is_refused_and_the_next_request_works(
    make_embedded_app: Callable[..., FastAPI], prompt: Any
) -> None:
    """vLLM #7283: an empty prompt ended the server."""
    with TestClient(make_embedded_app()) as client:
        assert complete(client, model="tiny", prompt=prompt).status_code == 400
        assert complete(client, model="tiny").status_code == 200


LARGE: dict[str, Any] = {
    "stop": ["a"] * 500_000,
    "prompt": ["a"] * 500_000,
    "stop_token_ids": [1] * 500_000,
    "logit_bias": {str(i): 1 for i in range(500_000)},
    "control": {"objective": {"weights": {f"h{i}": 1.0 for i in range(400_000)}}},
    "messages": [{"role": "user", "content": ""}] * 200_000,
    "tokens": [1] * 1_000_000,
    "input": ["a"] * 500_000,
    "heads": ["a"] * 500_000,
}


@pytest.mark.parametrize("field", LARGE)
def test_every_list_and_map_has_a_length_that_is_checked_first(make_app: Callable[..., FastAPI], field: str) -> None:
    """vLLM #51447: 500,000 stop strings cost 54 seconds."""
    paths = {"messages": "/v1/chat/completions", "tokens": "/detokenize", "input": "/v1/value", "heads": "/v1/value"}
    path = paths.get(field, "/v1/completions")
    needed = {"/v1/completions": {"prompt": "hi"}, "/v1/value": {"input": "hi"}}.get(path, {})
    content = json.dumps({"model": "fake", **needed, field: LARGE[field]})
    with TestClient(make_app(settings={"max_body_bytes": 2**23})) as client:
        started_s = time.monotonic()
        response = client.post(path, content=content, headers=JSON)
        assert time.monotonic() - started_s < 10
        assert response.status_code == 400
        assert response.json()["error"]["param"].startswith(field)
        assert len(response.content) < 1000


@pytest.mark.parametrize(
    ("content", "param"),
    [
        (b'{"a [[": "\\"[:", "b": 1, "x": [' + b"[]," * 140_000, "x"),
        (b'{"x": {"y": 1}, "z\xff": {' + b'"a":1,' * 70_000, "z\ufffd"),
        (b'{"x": [], ' + b'"a":1,' * 70_000, "a"),
        (b'{"' + b"n" * 99 + b'": ' + b"[" * 140_000, "n" * 64),
        (b"[" * 140_000, None),
        (b'["a", ' + b"{}," * 140_000, None),
    ],
    ids=["lists", "members", "top", "long name", "nested", "no object"],
)
def test_a_body_of_too_many_parts_is_refused_by_the_field_that_has_them(
    make_app: Callable[..., FastAPI], content: bytes, param: str | None
) -> None:
    with TestClient(make_app(settings={"max_body_bytes": 2**20})) as client:
        response = client.post("/v1/completions", content=content, headers=JSON)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert "more than" in response.json()["error"]["message"]


@pytest.mark.parametrize("token", [-1, 258, 2**63, 1.0, True])
def test_a_token_id_outside_the_vocabulary_never_reaches_the_model(
    make_embedded_app: Callable[..., FastAPI], token: Any
) -> None:
    """vLLM #44968: token ids out of range ended the engine."""
    with TestClient(make_embedded_app()) as client:
        for body in ({"prompt": [token]}, {"prompt": [[1], [token]]}, {"stop_token_ids": [token]}):
            assert complete(client, model="tiny", **body).status_code == 400
        assert complete(client, model="tiny", logit_bias={str(token): 1}).status_code == 400
        assert client.post("/detokenize", json={"tokens": [token]}).status_code == 400
        assert complete(client, model="tiny", prompt=[257, 0], max_tokens=2).status_code == 200


UNSAFE_MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


def test_nothing_that_a_request_reaches_can_unpickle_or_run_code() -> None:
    """CVE-2025-62164 (vLLM), CVE-2026-7304 (SGLang): tensors and code in requests."""
    for path in [*(ROOT / "server").rglob("*.py"), *(ROOT / "value_models").rglob("*.py")]:
        if path.name == "importer.py":
            # Reached from the command line alone (tests/test_architecture.py).
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & UNSAFE_MODULES, path
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in UNSAFE_MODULES, path
            elif isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in {"torch.load", "eval", "exec", "compile", "__import__"}, path


NAMING_FIELDS = {
    "control.objective.weights", "control.objective.values", "control.objective.floors", "control.gate.head",
    "control.stop_below",
}  # fmt: skip


@pytest.mark.parametrize("name", ["../plain", "/etc/passwd", "http://a/b", "a\x00b", "..", "plain/../plain"])
def test_a_head_is_a_name_and_never_a_path(make_embedded_app: Callable[..., FastAPI], name: str) -> None:
    """CVE-2025-62164 (vLLM), CVE-2026-7304 (SGLang): files named by requests."""
    with TestClient(make_embedded_app()) as client:
        for control in (
            {"objective": {"weights": {name: 1.0}}},
            {"objective": {"type": "worst_case", "weights": {name: 1.0}}},
            {"objective": {"type": "target", "values": {name: 1.0}}},
            {"objective": {"type": "floor", "weights": {"plain": 1.0}, "floors": {name: 1.0}}},
            {"objective": {"weights": {"plain": 1.0}}, "gate": {"head": name, "below": 1.0}},
            {"objective": {"weights": {"plain": 1.0}}, "stop_below": {name: 1.0}},
        ):
            response = complete(client, model="tiny", control=control)
            assert response.status_code == 404
            assert response.json()["error"]["param"] in NAMING_FIELDS
        assert complete(client, model=f"tiny@{name}").status_code == 404
        assert complete(client, model="tiny", prompt_embeds="gASVAAAA").json()["error"]["param"] == "prompt_embeds"


def test_a_head_that_is_no_safetensors_file_is_refused(
    make_embedded_app: Callable[..., FastAPI], tmp_path: Path
) -> None:
    """CVE-2025-32434, CVE-2026-24747 (torch): code in files of tensors."""
    ran = tmp_path / "ran"
    evil = b"cposix\nsystem\n(S'touch " + str(ran).encode() + b"'\ntR."
    folder = tmp_path / "heads" / "positive"
    with TestClient(make_embedded_app(management_keys=MANAGER)) as client:
        (folder / "head.safetensors").write_bytes(evil)
        card = json.loads((folder / "card.json").read_text())
        card["tensors_sha256"] = hashlib.sha256(evil).hexdigest()
        (folder / "card.json").write_text(json.dumps(card))
        for other in ("head.pt", "head.bin", "head.pkl"):
            (folder / other).write_bytes(evil)
        headers = {"Authorization": f"Bearer {MANAGER}"}
        assert client.post("/v1/management/heads/positive/reload", headers=headers).status_code == 409
        assert complete(client, model="tiny@positive", max_tokens=2).status_code == 200
    assert not ran.exists()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_a_template_from_a_request_is_refused(client: TestClient, path: str) -> None:
    """CVE-2025-61620 (vLLM): templates from requests were rendered."""
    body = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "chat_template": "{{ 7 * 7 }}"}
    response = client.post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "chat_template")


@pytest.mark.parametrize("name", ["tokenize", "chat_template", "conversation", "add_generation_prompt", "anything"])
def test_arguments_of_the_template_are_refused(client: TestClient, name: str) -> None:
    """CVE-2025-62426 (vLLM): `chat_template_kwargs` took the place of the call's own arguments."""
    response = chat(client, chat_template_kwargs={name: True})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "chat_template_kwargs")


def test_a_models_own_template_is_rendered_in_a_sandbox_and_messages_are_data() -> None:
    """CVE-2026-5760 (SGLang): Jinja without a sandbox."""
    tokenizer = byte_tokenizer()
    text = tokenizer.decode(encode_chat(tokenizer, [{"role": "user", "content": "{{ 7 * 7 }} {% if 1 %}"}]))
    assert "{{ 7 * 7 }} {% if 1 %}" in text
    tokenizer.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(InvalidRequestError, match="unsafe"):
        encode_chat(tokenizer, [{"role": "user", "content": "hi"}])


def test_a_stop_string_is_a_literal() -> None:
    """Regular expressions from users, in several servers: `(a+)+$` is four seconds or four characters."""
    matcher = StopMatcher(("(a+)+$",))
    started_s = time.monotonic()
    assert "".join(matcher.add(part) for part in ("a" * 20_000, "b", "c(a+", ")+", "$d")) == "a" * 20_000 + "bc"
    assert matcher.has_stopped
    assert time.monotonic() - started_s < 5


@pytest.mark.parametrize("schema", [{"pattern": "(a+)+$"}, {"items": {"patternProperties": {"(a+)+$": {}}}}])
def test_a_schema_brings_no_regular_expression(client: TestClient, schema: dict[str, Any]) -> None:
    """Regular expressions from users: a JSON schema may hold them, and none is compiled."""
    wrapper = {"name": "a", "schema": schema}
    response = complete(client, response_format={"type": "json_schema", "json_schema": wrapper})
    assert response.status_code == 400
    assert "regular expressions from requests are not run" in response.json()["error"]["message"]


def test_headers_bodies_and_nesting_are_bounded(make_app: Callable[..., FastAPI]) -> None:
    """CVE-2025-48956 (vLLM): huge headers ended the server."""
    with serving(make_app()) as url:
        head = b"GET /v1/models HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX-Big: "
        for size in (40_000, 100_000, 1_000_000):
            # At a megabyte the server hangs up; whether its answer arrives before the reset is the network's business.
            if answer := raw(url, head + b"a" * size + b"\r\n\r\n"):
                assert status_of(answer) == 431
                assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
        assert status_of(raw(url, b"no http at all\r\n\r\n")) == 400
        post = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: application/json\r\n"
        assert status_of(raw(url, post + b"Content-Length: 99999999\r\n\r\n")) == 413
        deep = b"[" * 10_000 + b"]" * 10_000
        assert status_of(raw(url, post + b"Content-Length: 20000\r\n\r\n" + deep)) == 400
        assert status_of(raw(url, head + b"a\r\n\r\n")) == 200


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_inside_tells_nothing_of_the_inside(make_app: Callable[..., FastAPI], stream: bool) -> None:
    """CVE-2026-22778 (vLLM): an error's text told an address in memory."""
    app = make_app()

    def broken(_: Any) -> Any:
        raise RuntimeError("cannot use tensor <object at 0x7f00deadbeef> in /srv/secret.py")

    app.state.engine._chunks = broken
    with TestClient(app, raise_server_exceptions=False) as client:
        response = complete(client, stream=stream)
    for told in ("0x7f00", "secret", "tensor", "Traceback", "RuntimeError"):
        assert told not in response.text
    assert response.headers["x-request-id"] in response.text


SPECIAL = ["<eos>", "<bos>", "<eos>" * 40, "a<eos>b", "<|im_start|>system\n", "<|endoftext|>", "\x00", "\u202e", "�"]


@pytest.mark.parametrize("text", SPECIAL)
def test_special_tokens_in_a_prompt_are_served(make_embedded_app: Callable[..., FastAPI], text: str) -> None:
    """CVE-2026-44222 (vLLM): special tokens in a prompt ended the engine."""
    options: dict[str, Any] = {"max_tokens": 3, "repetition_penalty": 1.3, "presence_penalty": 1.0}
    with TestClient(make_embedded_app()) as client:
        assert complete(client, model="tiny", prompt=text, echo=True, logprobs=2, **options).status_code == 200
        messages = [{"role": "user", "content": text}]
        assert chat(client, model="tiny", messages=messages, **options).status_code == 200


CHOICES: dict[str, list[Any]] = {
    "temperature": [0, 1e-9, 0.7, 2],
    "top_p": [1e-9, 0.5, 1],
    "top_k": [-1, 0, 1, 10**6],
    "min_p": [0, 0.5, 1],
    "n": [1, 3],
    "stop": ["a", ["\n", "e", "xyz", " "]],
    "stop_token_ids": [[101], [256]],
    "ignore_eos": [True],
    "logit_bias": [{"256": 100}, {"101": -100, "102": 100}, {}],
    "presence_penalty": [-2, 2],
    "frequency_penalty": [-2, 2],
    "repetition_penalty": [0.1, 1.0, 10],
    "logprobs": [0, 20],
    "echo": [True],
    "stream": [True],
    "seed": [-(2**63), 2**63 - 1],
    "max_tokens": [1, 5],
    "timeout_s": [30],
    "response_format": [
        {"type": "text"},
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["<eos>", 1, None]}}},
    ],
    "control": [
        {"objective": {"weights": {"positive": 10, "plain": -10}}, "steps": 100, "step_size": 10, "max_shift": 2},
        {"objective": {"weights": {"positive": -1e-300}}, "steps": 0, "max_kl": 1e-300},
        {"objective": {"weights": {"plain": 1}}, "trace": True},
        {"objective": {"type": "worst_case", "weights": {"positive": 10, "plain": -10}}, "max_response_kl": 1e-300},
        {"objective": {"type": "target", "values": {"positive": 1e6}}, "gate": {"head": "plain", "above": -1e6}},
        {"objective": {"type": "floor", "weights": {"plain": 1}, "floors": {"positive": -1e6}}, "window": {"start": 2}},
        {"objective": {"weights": {"plain": 1}}, "schedule": {"type": "linear", "tokens": 1}, "trace": True},
        {"objective": {"weights": {"plain": 1}}, "stop_below": {"positive": 1e6}},
    ],
}


@pytest.fixture(scope="module")
def made() -> Iterator[dict[str, TestClient]]:
    """The app of the first example, for all of them: starting an engine takes longer than asking it."""
    clients: dict[str, TestClient] = {}
    yield clients
    for client in clients.values():
        client.__exit__(None, None, None)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(sorted(CHOICES)), min_size=2, max_size=4, unique=True), st.data())
def test_any_parameters_together_are_served_or_refused_and_the_engine_lives(
    make_embedded_app: Callable[..., FastAPI], made: dict[str, TestClient], names: list[str], data: st.DataObject
) -> None:
    """CVE-2026-44223 (vLLM): penalties with special tokens ended the engine; so every pair, control included."""
    if not made:
        made["client"] = TestClient(make_embedded_app())
        made["client"].__enter__()
    client = made["client"]
    body = {name: data.draw(st.sampled_from(CHOICES[name]), label=name) for name in names}
    response = complete(client, **{"max_tokens": 3, "model": "tiny", "prompt": "<eos>hé", **body})
    is_endless = "ignore_eos" in body and body.get("response_format", {"type": "text"})["type"] != "text"
    assert response.status_code == (400 if is_endless else 200), response.text
    assert ('"error"' in response.text) == is_endless
    assert client.get("/health").status_code == 200


def numbers(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of the fields that hold a number or a list of numbers."""
    for name, schema in model.model_json_schema()["properties"].items():
        kinds = {option.get("type") for option in schema.get("anyOf", [schema])}
        if kinds & {"integer", "number"} and name != "logprobs":
            yield prefix + name


NUMBERS = {*numbers(CompletionBody), "logprobs", *(numbers(ControlParams, "control."))}
MAY_BE_NEGATIVE = {"top_k", "seed", "presence_penalty", "frequency_penalty"}


def test_the_numbers_are_found() -> None:
    assert {"n", "min_p", "timeout_s", "control.steps", "control.max_kl"} < NUMBERS
    assert len(NUMBERS) >= 16
    assert {*numbers(ChatBody)} - NUMBERS == {"max_completion_tokens", "top_logprobs"}


@pytest.mark.parametrize("field", sorted(NUMBERS))
@pytest.mark.parametrize("value", ["-1", "NaN", "Infinity", "-Infinity", "1e308", "true", '"1"', "1" * 5000])
def test_a_number_that_is_none_or_out_of_range_is_refused(client: TestClient, field: str, value: str) -> None:
    """CVE-2026-21869 (llama.cpp): a negative number reached C++."""
    if value == "-1" and field in MAY_BE_NEGATIVE:
        return
    name = field.removeprefix("control.")
    given_field = f'"{name}": {value}'
    if name != field:
        given_field = f'"control": {{"objective": {{"weights": {{"plain": 1}}}}, {given_field}}}'
    content = f'{{"model": "fake", "prompt": "hi", {given_field}}}'
    response = client.post("/v1/completions", content=content, headers=JSON)
    assert response.status_code == 400, response.text
    assert len(response.content) < 1000


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_model_folder_that_brings_code_is_refused(
    model_folder: Callable[..., Path], tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CVE-2026-22807 (vLLM), CVE-2026-4372 (transformers): code in a model's folder was run."""
    for path in model_folder().iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps({**config, "auto_map": {"AutoConfig": "evil.Config"}}))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelLoadError, match="auto_map"):
        loader.load_model(str(tmp_path))
    told: list[dict[str, Any]] = []
    for auto in (AutoModelForCausalLM, AutoTokenizer):
        real = auto.from_pretrained
        monkeypatch.setattr(auto, "from_pretrained", lambda *a, real=real, **k: (told.append(k), real(*a, **k))[1])
    loader.load_model(str(model_folder()), device="cpu")
    assert [options["trust_remote_code"] for options in told] == [False, False]
    assert told[1]["use_safetensors"] is True


def test_strangers_reach_nothing_unless_someone_says_so() -> None:
    """CVE-2026-7482 (Ollama): management without authentication, on every address."""
    assert Settings().host == "127.0.0.1"
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.com"):
        with pytest.raises(ValidationError, match="host"):
            Settings(host=host)
        Settings(host=host, api_keys=KEY)  # type: ignore[arg-type]
        Settings(host=host, allow_public_bind=True)


def test_management_needs_its_own_key(make_app: Callable[..., FastAPI]) -> None:
    """CVE-2026-7482 (Ollama)."""
    with TestClient(make_app(settings={"api_keys": KEY, "management_keys": MANAGER})) as client:
        for key, status in ((None, 401), (KEY, 401), (MANAGER, 200)):
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            assert client.post("/v1/management/heads/plain/unload", headers=headers).status_code == status
    with TestClient(make_app()) as client:
        assert client.post("/v1/management/heads/plain/unload").status_code == 404


def test_what_is_cached_for_one_key_is_never_used_for_another(
    make_app: Callable[..., FastAPI], core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefix caches told callers by their timing what others had asked."""
    app, seen = make_app(settings={"api_keys": f"{KEY} {MANAGER}"}), []
    generate = app.state.engine.generate
    app.state.engine.generate = lambda request: (seen.append(request), generate(request))[1]
    with TestClient(app) as client:
        for key in (KEY, MANAGER, KEY):
            client.headers["authorization"] = f"Bearer {key}"
            assert complete(client).status_code == 200
    salts = [request.cache_salt for request in seen]
    assert salts[0] == salts[2] != salts[1]
    assert all(salts)

    computed: list[int] = []
    forward = core.runner.forward

    def count(rows: Any, segments: Any, **options: Any) -> Any:
        computed.append(sum(len(segment.token_ids) for segment in segments))
        return forward(rows, segments, **options)

    monkeypatch.setattr(core.runner, "forward", count)
    sampling = SamplingParams(max_tokens=2, ignore_eos=True)
    prompt = tuple(i % 250 for i in range(200))
    for salt in ("a", "b", "c"):
        computed.clear()
        run(core, [GenerationRequest(salt, prompt, sampling, cache_salt=salt)])
        assert sum(computed) == len(prompt)


INJECTED = "x\nERROR root: FAKE\r\x1b[31m\u2028\x00\x85"


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()])
def test_nothing_in_a_request_makes_a_second_log_line(
    client: TestClient, caplog: pytest.LogCaptureFixture, formatter: logging.Formatter
) -> None:
    """Log injection, in several servers."""
    with caplog.at_level("INFO"):
        complete(client, user=INJECTED)
        complete(client, model=INJECTED)
        client.get("/%0aERROR%20root:%20FAKE%1b", headers={"user-agent": "x\x1b[31m"})
        client.post("/v1/completions", content=b"\n{", headers={**JSON, "x-request-id": "a%0aFAKE"})
    records = [record for record in caplog.records if record.name.startswith(("recontrol", "server"))]
    assert len(records) == 4
    for record in records:
        line = formatter.format(record)
        assert line.isprintable(), line
        if isinstance(formatter, JsonFormatter):
            assert json.loads(line)["request_id"]


@pytest.mark.parametrize("given_id", ["a" * 65, "a b", "a\x00", "<script>", "é", "a;b", ""])
def test_a_request_id_is_only_reflected_when_it_is_harmless(client: TestClient, given_id: str) -> None:
    """A reflected request id."""
    response = client.get("/health", headers={"x-request-id": given_id.encode()})
    assert response.headers["x-request-id"] != given_id
    assert client.get("/health", headers={"x-request-id": "A.b_c-9"}).headers["x-request-id"] == "A.b_c-9"


@pytest.mark.parametrize(
    "control",
    [
        {"steps": 101},
        {"step_size": 10.1},
        {"max_kl": 0.51},
        {"max_shift": 2.1},
        {"objective": {"weights": {f"h{i}": 1.0 for i in range(9)}}},
        {"objective": {"weights": {"plain": 10.1}}},
    ],
)
def test_control_is_bounded_and_pinned_heads_stay(make_app: Callable[..., FastAPI], control: dict[str, Any]) -> None:
    """Ours: control as a denial of service, or as a way round what keeps text harmless."""
    pinned = json.dumps({"objective": {"weights": {"plain": 1.0}}})
    with TestClient(make_app(settings={"pinned_control": pinned})) as client:
        response = complete(client, control={"objective": {"weights": {"positive": 1.0}}, **control})
        assert (response.status_code, response.json()["error"]["param"][:7]) == (400, "control")
        for body in ({}, {"control": {"objective": {"weights": {"positive": -10.0}}, "steps": 0}}):
            assert "plain" in complete(client, **body).json()["choices"][0]["control"]["value_after"]
