"""Servers that share one place for their heads: each follows it without a restart, and takes no half of a head."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fastapi import FastAPI
from pydantic import ValidationError
from safetensors.torch import save
from starlette.testclient import TestClient

from server.app import create_app
from server.engines.embedded.engine import EmbeddedEngine
from server.errors import ConfigurationError
from server.settings import Settings
from server.telemetry import Telemetry
from server.watch import HeadWatch
from tests.api.conftest import eventually
from tests.conftest import random_head, write_heads
from value_models.head_folder import open_heads
from value_models.heads import ValueHead
from value_models.store import CARD_FILE, HEAD_FILE

MANAGER = "Manager-0123456789"
AS_MANAGER = {"Authorization": f"Bearer {MANAGER}"}


@pytest.fixture(params=["path", "file", "memory"])
def location(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("RECONTROL_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "shared").mkdir()
    yield {"path": "", "file": "file://", "memory": "memory:/"}[request.param] + str(tmp_path / "shared")
    fsspec.filesystem("memory").rm("/", recursive=True)


@pytest.fixture
def publish(location: str, load_tiny: Callable[..., Any], tmp_path: Path) -> Callable[[str, ValueHead], None]:
    def publish(name: str, head: ValueHead) -> None:
        open_heads(location).publish(
            name, open_heads(write_heads(tmp_path / "made", {name: head}, load_tiny().identity))
        )

    return publish


@pytest.fixture
def make_server(
    location: str, publish: Callable[..., None], model_folder: Callable[..., Path], heads: dict[str, ValueHead]
) -> Callable[..., FastAPI]:
    """Servers on the place, where the heads `positive` and `plain` lie."""
    publish("positive", heads["good"])
    publish("plain", heads["line"])

    def make(**settings: Any) -> FastAPI:
        resolved = Settings(
            model=str(model_folder()), served_model_name="tiny", heads_dir=location, device="cpu", dtype="float32",
            management_keys=MANAGER, **settings,
        )  # fmt: skip
        telemetry = Telemetry()
        app = create_app(resolved, EmbeddedEngine(resolved, observer=telemetry), telemetry)
        app.state.watch = HeadWatch(app.state.engine, telemetry, location, 1.0)
        return app

    return make


def values(client: TestClient) -> dict[str, float]:
    response = client.post("/v1/value", json={"model": "tiny", "input": "a text"})
    assert response.status_code == 200, response.text
    return response.json()["data"][0]["values"]


def look(client: TestClient) -> list[str]:
    """The server's watch looks once, on the server's own event loop."""
    assert client.portal is not None
    return client.portal.call(client.app.state.watch.look)  # type: ignore[attr-defined]


def reload(client: TestClient, name: str) -> int:
    return client.post(f"/v1/management/heads/{name}/reload", headers=AS_MANAGER).status_code


def test_a_head_that_is_published_anew_reaches_every_server_by_management_or_by_itself(
    make_server: Callable[..., FastAPI], publish: Callable[..., None]
) -> None:
    with TestClient(make_server()) as managed, TestClient(make_server(heads_poll_s=1)) as polling:
        old = values(managed)
        assert values(polling) == old
        publish("positive", random_head(9))
        assert reload(managed, "positive") == 200
        new = values(managed)
        assert (new["plain"], new["positive"] != old["positive"]) == (old["plain"], True)
        assert eventually(lambda: values(polling) == new, within_s=30)


def test_a_new_head_is_offered_and_counted_and_one_that_is_gone_stays(
    make_server: Callable[..., FastAPI], publish: Callable[..., None], location: str, tmp_path: Path
) -> None:
    with TestClient(make_server()) as client:
        assert look(client) == []
        publish("kind", random_head(9))
        assert look(client) == ["kind"]
        assert look(client) == []
        assert set(values(client)) == {"kind", "plain", "positive"}
        assert (
            'controlled_tokens_total{head="kind"'
            in client.get("/metrics", headers={"Authorization": f"Bearer {MANAGER}"}).text
        )
        filesystem, root = fsspec.core.url_to_fs(location)
        filesystem.rm(f"{root}/kind", recursive=True)
        assert look(client) == []
        assert set(values(client)) == {"kind", "plain", "positive"}
        assert reload(client, "kind") == 404


def test_a_head_that_a_manager_unloaded_comes_back_by_a_manager_alone(
    make_server: Callable[..., FastAPI], publish: Callable[..., None]
) -> None:
    with TestClient(make_server()) as client:
        look(client)
        assert client.post("/v1/management/heads/plain/unload", headers=AS_MANAGER).status_code == 200
        publish("plain", random_head(9))
        assert look(client) == []
        assert set(values(client)) == {"positive"}
        assert client.post("/v1/management/heads/plain/load", headers=AS_MANAGER).status_code == 200
        publish("plain", random_head(10))
        assert look(client) == ["plain"]


def broken_card(card: bytes) -> bytes:
    return card[: len(card) // 2]


def foreign_card(card: bytes) -> bytes:
    loaded = json.loads(card)
    loaded["base_model"]["fingerprint"] = "another"
    return json.dumps(loaded).encode()


@pytest.mark.parametrize(
    ("file", "change"),
    [(CARD_FILE, broken_card), (CARD_FILE, foreign_card), (CARD_FILE, None), (HEAD_FILE, None)],
    ids=["broken-card", "foreign-card", "new-card", "new-tensors"],
)
def test_half_a_head_never_takes_the_place_of_a_whole_one_and_the_other_half_mends_it(
    make_server: Callable[..., FastAPI],
    publish: Callable[..., None],
    location: str,
    caplog: pytest.LogCaptureFixture,
    file: str,
    change: Callable[[bytes], bytes] | None,
) -> None:
    filesystem, root = fsspec.core.url_to_fs(location)
    path = f"{root}/positive/{file}"
    with TestClient(make_server()) as client:
        old = values(client)
        whole = filesystem.cat_file(path)
        publish("positive", random_head(9))
        new_file = filesystem.cat_file(path)
        other = f"{root}/positive/{CARD_FILE if file == HEAD_FILE else HEAD_FILE}"
        new_other = filesystem.cat_file(other)
        # Back to the old head, but for one file.
        publish("positive", client.app.state.engine._core.registry.head("positive"))  # type: ignore[attr-defined]
        filesystem.pipe_file(path, change(whole) if change else new_file)
        for _ in range(3):
            assert look(client) == []
            assert values(client) == old
        if file == CARD_FILE:
            assert reload(client, "positive") == 409
            assert len([r for r in caplog.records if "not followed for 'positive'" in r.message]) == 1
        assert values(client) == old
        filesystem.pipe_file(path, new_file)
        filesystem.pipe_file(other, new_other)
        assert look(client) == ["positive"]
        assert values(client)["positive"] != old["positive"]


def test_a_malformed_head_does_not_keep_later_ones_from_being_followed(
    make_server: Callable[..., FastAPI],
    publish: Callable[..., None],
    location: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    filesystem, root = fsspec.core.url_to_fs(location)
    with TestClient(make_server()) as client:
        data = save({"inputs_UD": torch.ones(4), "reward": torch.ones(1)})
        card = {**json.loads(filesystem.cat_file(f"{root}/plain/{CARD_FILE}")), "name": "a"}
        card["tensors_sha256"] = hashlib.sha256(data).hexdigest()
        filesystem.makedirs(f"{root}/a", exist_ok=True)
        filesystem.pipe_file(f"{root}/a/{HEAD_FILE}", data)
        filesystem.pipe_file(f"{root}/a/{CARD_FILE}", json.dumps(card).encode())
        publish("positive", random_head(9))
        assert look(client) == ["positive"]
        assert "not followed for 'a'" in caplog.text
        # Nor does an error that nobody thought of.
        engine = client.app.state.engine  # type: ignore[attr-defined]
        load = engine.load_head

        async def load_head(name: str) -> None:
            if name == "plain":
                raise ZeroDivisionError("what")
            await load(name)

        monkeypatch.setattr(engine, "load_head", load_head)
        publish("plain", random_head(8))
        publish("positive", random_head(7))
        assert look(client) == ["positive"]


def test_a_place_that_goes_away_is_told_once_and_found_again(
    make_server: Callable[..., FastAPI],
    publish: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with TestClient(make_server()) as client:
        old = values(client)
        watch = client.app.state.watch  # type: ignore[attr-defined]
        there, watch._location = watch._location, "memory://nowhere/at-all"
        assert look(client) == look(client) == []
        assert len([r for r in caplog.records if "not followed: memory://nowhere" in r.message]) == 1
        assert values(client) == old
        watch._location = there
        publish("positive", random_head(9))
        assert look(client) == ["positive"]


@pytest.mark.parametrize("url", ["memory://nowhere/at-all", "nonsense://x", "/nowhere/at/all"])
def test_a_server_does_not_start_on_a_place_that_is_not_there(model_folder: Callable[..., Path], url: str) -> None:
    engine = EmbeddedEngine(Settings(model=str(model_folder()), heads_dir=url, device="cpu", dtype="float32"))
    with pytest.raises(ConfigurationError, match=f"heads_dir: {url}"):
        engine._build_core()


def test_polling_needs_a_place_that_may_change() -> None:
    with pytest.raises(ValidationError, match="heads_poll_s: set heads_dir"):
        Settings(heads_poll_s=5)


@pytest.mark.parametrize("name", ["memory:%2f%2fbucket%2fpositive", "..%2fpositive", "s3:%2f%2fb%2fx", "*"])
def test_a_request_names_heads_and_never_places(make_server: Callable[..., FastAPI], name: str) -> None:
    with TestClient(make_server()) as client:
        for action in ("load", "reload"):
            assert client.post(f"/v1/management/heads/{name}/{action}", headers=AS_MANAGER).status_code == 404
