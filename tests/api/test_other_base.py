"""Heads that were made for another model: refused unless allowed, and then with a warning wherever they are used."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from transformers import AutoModelForCausalLM

from server.app import create_app
from server.engines import heads as heads_module
from server.engines.embedded.engine import EmbeddedEngine
from server.engines.embedded.model.loader import load_model
from server.errors import HeadMismatchError
from server.kernels import native
from server.settings import Settings
from server.telemetry import Telemetry
from server.watch import HeadWatch
from tests.conftest import byte_tokenizer, random_head, write_heads
from value_models.heads import ValueHead

MANAGER = "Manager-0123456789"
AS_MANAGER = {"Authorization": f"Bearer {MANAGER}"}
QUANTIZED = {"quantization": "int8", "dtype": "bfloat16"}
NEEDS_KERNELS = pytest.mark.skipif(native() is None, reason="no native kernels on this machine")
STEER = {"objective": {"weights": {"positive": 1.0}}, "step_size": 2.0}


@pytest.fixture
def heads_dir(heads: dict[str, ValueHead], load_tiny: Callable[..., Any], tmp_path: Path) -> Path:
    """Of the model that the fine-tune was made from."""
    return write_heads(tmp_path / "heads", {"positive": heads["good"], "plain": heads["line"]}, load_tiny().identity)


@pytest.fixture
def make_served(heads_dir: Path, fine_tune: Path) -> Callable[..., FastAPI]:
    """The app over the fine-tune."""

    def make(model: Path = fine_tune, *, allow_other_base: bool = True, **settings: Any) -> FastAPI:
        resolved = Settings(**{
            "model": str(model), "served_model_name": "tiny", "heads_dir": heads_dir, "device": "cpu",
            "dtype": "float32", "max_batch_size": 4, "management_keys": MANAGER, "allow_other_base": allow_other_base,
            **settings,
        })  # fmt: skip
        telemetry = Telemetry()
        return create_app(resolved, EmbeddedEngine(resolved, observer=telemetry), telemetry)

    return make


@pytest.fixture
def client(make_served: Callable[..., FastAPI]) -> Iterator[TestClient]:
    with TestClient(make_served()) as client:
        yield client


def complete(client: TestClient, **body: Any) -> Any:
    response = client.post("/v1/completions", json={"model": "tiny", "prompt": "hello", "max_tokens": 6, **body})
    assert response.status_code == 200, response.text
    return response.json()["choices"] if not body.get("stream") else response.text


def warnings_of(client: TestClient, path: str) -> dict[str, list[str] | None]:
    return {entry["id"]: entry.get("warnings") for entry in client.get(path).json()["data"]}


def rewrite_card(heads_dir: Path, head: str, **base_model: Any) -> None:
    path = heads_dir / head / "card.json"
    card = json.loads(path.read_text())
    path.write_text(json.dumps({**card, "base_model": {**card["base_model"], **base_model}}))


def manage(client: TestClient, name: str, action: str) -> Any:
    return client.post(f"/v1/management/heads/{name}/{action}", headers=AS_MANAGER)


# ---- at start


async def test_a_fine_tune_refuses_its_bases_heads_and_says_how_to_serve_them(
    make_served: Callable[..., FastAPI],
) -> None:
    with pytest.raises(HeadMismatchError, match=r"^[^\n]*'llama-tuned': fingerprint is [^\n]*--allow-other-base\.$"):
        await make_served(allow_other_base=False).state.engine.start()


def test_allowed_heads_are_logged_one_line_each_with_what_differs(
    make_served: Callable[..., FastAPI], caplog: pytest.LogCaptureFixture
) -> None:
    with TestClient(make_served()):
        told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 2
    assert all("was made for the model 'llama', not for" in line and "\n" not in line for line in told)


def test_a_head_of_another_size_is_refused_whatever_is_allowed(
    make_served: Callable[..., FastAPI], heads_dir: Path
) -> None:
    small = {"name": "llama", "hidden_size": 16}
    write_heads(heads_dir, {"small": random_head(1, hidden_size=16)}, small)
    with pytest.raises(HeadMismatchError, match=r"hidden_size is 32, the head was made for 16.*whatever is allowed"):
        make_served().state.engine._build_core()


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2", "gpt2"])
def test_a_head_of_another_architecture_of_the_same_size_is_served_with_the_architectures_named(
    make_served: Callable[..., FastAPI], model_folder: Callable[..., Path], architecture: str
) -> None:
    with TestClient(make_served(model_folder(architecture))) as client:
        (warning,) = warnings_of(client, "/v1/heads")["plain"] or []
        assert "the head was made for 'LlamaForCausalLM'; fingerprint" in warning
        (choice,) = complete(client, control={**STEER, "max_kl": 0.2}, max_tokens=12)
        assert choice["control"]["controlled_share"] > 0
        assert choice["control"]["max_kl"] <= 0.2


def test_a_fine_tune_with_more_tokens_is_served_within_its_budget(
    make_served: Callable[..., FastAPI], model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder())
    model.resize_token_embeddings(264)
    model.save_pretrained(tmp_path / "wider")
    byte_tokenizer().save_pretrained(tmp_path / "wider")
    with TestClient(make_served(tmp_path / "wider")) as client:
        (choice,) = complete(client, control={**STEER, "max_kl": 0.2}, max_tokens=12)
    assert choice["control"]["max_kl"] <= 0.2
    assert "vocab_size is 264, the head was made for 258" in choice["control"]["warnings"][0]


@pytest.mark.parametrize("settings", [{}, {"dtype": "bfloat16"}, pytest.param(QUANTIZED, marks=NEEDS_KERNELS)], ids=str)
def test_the_heads_own_model_needs_no_warning_in_whatever_numbers_it_is_served(
    make_served: Callable[..., FastAPI], model_folder: Callable[..., Path], settings: dict[str, Any]
) -> None:
    for allow in (False, True):
        with TestClient(make_served(model_folder(), allow_other_base=allow, **settings)) as client:
            assert warnings_of(client, "/v1/heads") == {"plain": None, "positive": None}
            assert "warnings" not in complete(client, control=STEER)[0]["control"]


def test_a_fine_tunes_head_is_as_foreign_to_its_base(
    make_served: Callable[..., FastAPI], model_folder: Callable[..., Path], heads_dir: Path, fine_tune: Path
) -> None:
    write_heads(heads_dir, {"plain": random_head(3)}, load_model(str(fine_tune), device="cpu").identity)
    with pytest.raises(HeadMismatchError, match=r"'plain' in .*for the model 'llama': fingerprint"):
        make_served(model_folder(), allow_other_base=False).state.engine._build_core()
    with TestClient(make_served(model_folder())) as client:
        (choice,) = complete(client, model="tiny@plain")
    assert "for the model 'llama-tuned', not for the 'llama'" in choice["control"]["warnings"][0]


def test_a_renamed_folder_holds_the_same_model(
    make_served: Callable[..., FastAPI], model_folder: Callable[..., Path], heads_dir: Path
) -> None:
    for head in ("positive", "plain"):
        rewrite_card(heads_dir, head, name="as-it-was-called-before")
    with TestClient(make_served(model_folder(), allow_other_base=False)) as client:
        assert warnings_of(client, "/v1/heads") == {"plain": None, "positive": None}


@pytest.mark.parametrize("name", ["llama", "some-org/Llama", "/models/llama/"])
def test_an_imported_head_without_a_fingerprint_fits_the_model_of_its_name(
    make_served: Callable[..., FastAPI], model_folder: Callable[..., Path], heads_dir: Path, name: str
) -> None:
    for head in ("positive", "plain"):
        rewrite_card(heads_dir, head, name=name, architecture=None, vocab_size=None, fingerprint=None)
    with TestClient(make_served(model_folder(), allow_other_base=False)) as client:
        assert warnings_of(client, "/v1/heads") == {"plain": None, "positive": None}


def test_an_imported_head_without_a_fingerprint_is_refused_for_a_model_of_another_name_or_served_with_a_warning(
    make_served: Callable[..., FastAPI], heads_dir: Path
) -> None:
    for head in ("positive", "plain"):
        rewrite_card(heads_dir, head, architecture=None, vocab_size=None, fingerprint=None)
    with pytest.raises(HeadMismatchError, match=r"name is 'llama-tuned', the head was made for 'llama', of which"):
        make_served(allow_other_base=False).state.engine._build_core()
    with TestClient(make_served()) as client:
        assert "name is 'llama-tuned'" in complete(client, control=STEER)[0]["control"]["warnings"][0]


def test_shipped_heads_are_served_to_a_fine_tune_that_has_their_models_name(
    make_served: Callable[..., FastAPI], heads_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads_module, "shipped_heads_folder", lambda _: heads_dir)
    with TestClient(make_served(heads_dir=None, allow_other_base=False)) as client:
        assert warnings_of(client, "/v1/heads") == {}
    write_heads(heads_dir, {"small": random_head(1, hidden_size=16)}, {"name": "llama", "hidden_size": 16})
    with TestClient(make_served(heads_dir=None)) as client:
        assert set(warnings_of(client, "/v1/heads")) == {"plain", "positive"}


def test_where_no_heads_are_shipped_to_be_allowed_the_log_says_so(
    make_served: Callable[..., FastAPI], caplog: pytest.LogCaptureFixture
) -> None:
    make_served(heads_dir=None).state.engine._build_core()
    assert "allow_other_base: no heads are shipped for 'llama-tuned'; name a heads_dir" in caplog.text


def test_a_warned_head_steers_as_one_that_was_made_for_the_model(
    make_served: Callable[..., FastAPI], heads: dict[str, ValueHead], fine_tune: Path, tmp_path: Path
) -> None:
    identity = load_model(str(fine_tune), device="cpu", dtype="float32").identity
    own = write_heads(tmp_path / "own", {"positive": heads["good"]}, identity)
    choices = []
    for settings in ({}, {"heads_dir": own}):
        with TestClient(make_served(**settings)) as client:
            choices += complete(client, control=STEER, seed=1, max_tokens=20)
    assert choices[0]["control"].pop("warnings")
    assert choices[0] == choices[1]


# ---- in what is listed and answered


def test_heads_and_models_that_are_listed_tell_of_it(client: TestClient) -> None:
    listed = warnings_of(client, "/v1/heads")
    assert listed.keys() == {"plain", "positive"}
    assert all(len(warnings or []) == 1 for warnings in listed.values())
    assert client.get("/v1/heads/plain").json()["warnings"] == listed["plain"]
    models = warnings_of(client, "/v1/models")
    assert models == {"tiny": None, "tiny@plain": listed["plain"], "tiny@positive": listed["positive"]}


def test_every_controlled_choice_warns_of_the_heads_that_it_names_alone(client: TestClient) -> None:
    listed = warnings_of(client, "/v1/heads")
    for choice in complete(client, control=STEER, n=2):
        assert choice["control"]["warnings"] == listed["positive"]
    (choice,) = complete(client, model="tiny@plain")
    assert choice["control"]["warnings"] == listed["plain"]
    assert "control" not in complete(client)[0]
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "control": STEER}
    assert client.post("/v1/chat/completions", json=chat).json()["choices"][0]["control"]["warnings"]


@pytest.mark.parametrize("watching", [{"gate": {"head": "plain", "below": 0}}, {"stop_below": {"plain": -1e6}}])
def test_heads_that_only_watch_are_warned_of_too(client: TestClient, watching: dict[str, Any]) -> None:
    listed = warnings_of(client, "/v1/heads")
    (choice,) = complete(client, control={**STEER, **watching})
    assert choice["control"]["warnings"] == [*(listed["plain"] or []), *(listed["positive"] or [])]


def test_pinned_heads_warn_in_answers_to_those_who_did_not_ask_for_them(make_served: Callable[..., FastAPI]) -> None:
    with TestClient(make_served(pinned_control=json.dumps(STEER))) as client:
        assert "'positive'" in complete(client)[0]["control"]["warnings"][0]


def test_the_last_event_of_a_stream_warns(client: TestClient) -> None:
    events = [line.removeprefix("data: ") for line in complete(client, control=STEER, stream=True).splitlines() if line]
    summaries = [c["control"] for e in events[:-1] for c in json.loads(e)["choices"] if "control" in c]
    assert [summary["warnings"] for summary in summaries] == [warnings_of(client, "/v1/heads")["positive"]]


def test_scored_texts_come_with_the_warnings_of_the_heads_that_scored_them(client: TestClient) -> None:
    listed = warnings_of(client, "/v1/heads")
    body = {"model": "tiny", "input": ["a", "b"]}
    told = client.post("/v1/value", json={**body, "heads": ["plain"]}).json()
    assert told["warnings"] == listed["plain"]
    assert len(client.post("/v1/value", json=body).json()["warnings"]) == 2
    bare = client.post("/v1/value", json={**body, "heads": [], "hidden_state": "last"}).json()
    assert "warnings" not in bare


# ---- while the server runs


def test_management_follows_the_rule_in_the_same_words(
    make_served: Callable[..., FastAPI], model_folder: Callable[..., Path], heads_dir: Path
) -> None:
    with TestClient(make_served(model_folder(), allow_other_base=False)) as client:
        rewrite_card(heads_dir, "plain", fingerprint="another")
        response = manage(client, "plain", "reload")
        assert response.status_code == 409
        assert "the head was made for 'another'" in response.json()["error"]["message"]
        assert response.json()["error"]["message"].endswith("or serve it all the same with --allow-other-base.")
        assert warnings_of(client, "/v1/heads")["plain"] is None


def test_a_head_that_is_loaded_unloaded_or_made_for_the_model_after_all_brings_and_takes_its_warning(
    make_served: Callable[..., FastAPI],
    model_folder: Callable[..., Path],
    heads_dir: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with TestClient(make_served(model_folder())) as client:
        before = json.loads((heads_dir / "plain" / "card.json").read_text())
        rewrite_card(heads_dir, "plain", fingerprint="another", name="elsewhere")
        entry = next(head for head in manage(client, "plain", "reload").json()["data"] if head["id"] == "plain")
        assert "made for the model 'elsewhere'" in entry["warnings"][0]
        assert len([r for r in caplog.records if "'elsewhere'" in r.getMessage()]) == 1
        assert warnings_of(client, "/v1/heads") == {"plain": entry["warnings"], "positive": None}
        manage(client, "plain", "unload")
        assert warnings_of(client, "/v1/heads") == {"positive": None}
        assert manage(client, "plain", "load").status_code == 200
        (heads_dir / "plain" / "card.json").write_text(json.dumps(before))
        assert manage(client, "plain", "reload").status_code == 200
        assert warnings_of(client, "/v1/heads") == {"plain": None, "positive": None}
        assert "warnings" not in complete(client, model="tiny@plain")[0]["control"]


def test_the_watch_follows_the_rule_in_the_same_words(
    make_served: Callable[..., FastAPI],
    model_folder: Callable[..., Path],
    heads_dir: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for allow, found in ((False, []), (True, ["plain"])):
        write_heads(heads_dir, {"plain": random_head(3)}, load_model(str(model_folder()), device="cpu").identity)
        app = make_served(model_folder(), allow_other_base=allow)
        watch = HeadWatch(app.state.engine, app.state.telemetry, str(heads_dir), 1.0)
        with TestClient(app) as client:
            assert client.portal is not None
            rewrite_card(heads_dir, "plain", fingerprint="another")
            assert client.portal.call(watch.look) == found
            assert client.portal.call(watch.look) == []
            assert ("positive" in warnings_of(client, "/v1/heads")) is True
            assert bool(warnings_of(client, "/v1/heads")["plain"]) is allow
    assert len([r for r in caplog.records if "not followed for 'plain'" in r.message]) == 1
    assert len([r for r in caplog.records if "that is served: fingerprint" in r.message]) == 1


async def test_a_head_that_is_unloaded_in_mid_response_is_still_warned_of(
    make_served: Callable[..., FastAPI],
) -> None:
    app = make_served()
    with TestClient(app) as client:
        body = {"model": "tiny@positive", "prompt": "hello", "max_tokens": 60, "stream": True, "ignore_eos": True}
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            client.portal.start_task_soon(app.state.engine.unload_head, "positive")  # type: ignore[union-attr]
            last = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line][-1]
        assert "'positive' was made" in last["choices"][0]["control"]["warnings"][0]
