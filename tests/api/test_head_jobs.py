"""POST /v1/heads: who may, what is refused, and that what it makes is what the command line makes."""

from __future__ import annotations

import errno
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from server.cli import main
from server.training import trainer
from tests.api.conftest import eventually
from tests.api.test_access import KEY, MANAGER, bearer
from tests.cli.test_own_texts import CHAT, LABELLED, write

PAIRS = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(10)]
PROMPTS = [f"say {i}" for i in range(40)]
SENTENCE = {"instruction": "Be kind.", "prompts": PROMPTS, "instruction_tokens": 4}


@pytest.fixture
def manager(make_app: Callable[..., FastAPI]) -> Iterator[TestClient]:
    with TestClient(make_app(settings={"management_keys": MANAGER}), headers=bearer(MANAGER)) as client:
        yield client


def test_training_needs_a_management_key_and_looking_does_not(make_app: Callable[..., FastAPI]) -> None:
    body = {"name": "kind", "instruction": "Be kind."}
    settings = {"api_keys": KEY, "management_keys": MANAGER}
    with TestClient(make_app(settings=settings), headers=bearer(KEY)) as client:
        assert client.post("/v1/heads", json=body).status_code == 401
        assert client.get("/v1/management/jobs").status_code == 401
        assert client.get("/v1/heads").status_code == 200
    with TestClient(make_app()) as client:
        assert client.post("/v1/heads", json=body).status_code == 405
        assert client.get("/v1/management/jobs").status_code == 404


def test_an_engine_that_trains_no_heads_says_so(manager: TestClient) -> None:
    response = manager.post("/v1/heads", json={"name": "kind2", "instruction": "Be kind."})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "unsupported_field"
    assert "the fake engine trains none" in response.json()["error"]["message"]
    assert manager.get("/v1/management/jobs").json() == {"object": "list", "data": []}
    for method, path in (("GET", "/v1/management/jobs/none"), ("POST", "/v1/management/jobs/none/cancel")):
        response = manager.request(method, path)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "job_not_found")


@pytest.mark.parametrize(
    ("body", "param", "why"),
    [
        ({}, "instruction", "give one of pairs, texts and instruction"),
        ({"pairs": PAIRS, "texts": LABELLED}, "texts", "pairs is given already"),
        ({"pairs": PAIRS, "contrast": "x"}, "contrast", "goes with instruction alone"),
        ({"texts": LABELLED, "instruction_tokens": 3}, "instruction_tokens", "goes with instruction alone"),
        ({**SENTENCE, "max_tokens": 3}, "max_tokens", "goes with pairs or texts alone"),
        ({**SENTENCE, "metric": "natural"}, "metric", "goes with pairs or texts alone"),
        ({"pairs": PAIRS, "good_label": "a"}, "good_label", "goes with texts alone"),
        ({"pairs": []}, "pairs", "at least 1"),
        ({"pairs": [*PAIRS[:3], {"prompt": "a"}]}, "pairs.3", "chosen is missing"),
        ({"pairs": [*PAIRS[:3], "text"]}, "pairs.3", "a JSON object is needed"),
        ({"pairs": [{**PAIRS[0], "chosen": ""}]}, "pairs.0", "chosen: is empty"),
        ({"pairs": [{**PAIRS[0], "x": 1}]}, "pairs.0", "and ignore_fields x leaves them out"),
        ({"pairs": [*PAIRS, PAIRS[2]]}, "pairs.10", "the same two responses as in pairs.2"),
        ({"pairs": [{**PAIRS[0], "chosen": "\ud800"}]}, "pairs.0", "half of a surrogate pair"),
        ({"pairs": PAIRS[:3]}, "pairs", "at least 8 are needed"),
        ({"texts": [{"text": f"t{i}", "label": "ab"[i % 2]} for i in range(9)]}, "texts", "wanted with good_label"),
        ({"texts": [{"text": f"t{i}", "score": 1} for i in range(9)]}, "texts", "the same score"),
        ({"texts": [{"text": "a", "score": True}]}, "texts.0", "score: must be a finite number"),
        ({"instruction": " "}, "instruction", "it is empty"),
        ({"instruction": "\ud800"}, "instruction", "valid Unicode"),
        ({"instruction": "a b", "contrast": "a  b"}, "contrast", "it is the instruction itself"),
        ({"texts": [*LABELLED[:3], {"text": "a", "score": 1}]}, "texts.3", "label is missing"),
        ({"texts": [{"text": "a", "score": 0}, {"text": "b", "score": 1e300}]}, "texts.1", "from -1e+12 to 1e+12"),
        ({"texts": [{"text": "a", "score": -2e12}]}, "texts.0", "from -1e+12 to 1e+12"),
        ({"texts": [{"text": f"t{i}", "score": i * 1e-9} for i in range(9)]}, "texts", "not above 1e-05"),
        ({"texts": LABELLED, "center_by_prompt": True}, "texts", "whose mean center_by_prompt subtracts"),
        ({"pairs": PAIRS, "ignore_fields": ["chosen"]}, "ignore_fields", "pairs.0 needs chosen"),
        ({"pairs": PAIRS, "ignore_fields": ["prompt"]}, "ignore_fields", "pairs.0 needs prompt"),
        ({"texts": LABELLED, "ignore_fields": ["x", "label"]}, "ignore_fields", "texts.0 needs label"),
        ({"texts": LABELLED, "ignore_fields": ["text"]}, "ignore_fields", "texts.0 needs text"),
        ({"instruction": "x" * 4001}, "instruction", "at most 4000 characters"),
        ({"instruction": "a", "contrast": "x" * 4001}, "contrast", "at most 4000 characters"),
        ({"instruction": "a", "description": "x" * 4001}, "description", "at most 4000 characters"),
        ({"instruction": "a", "prompts": ["x" * 4001] * 20}, "prompts.0", "at most 4000 characters"),
        ({"instruction": "a", "prompts": [""] * 20}, "prompts.0", "at least 1 character"),
        ({"texts": LABELLED, "good_label": "x" * 257}, "good_label", "at most 256 characters"),
        ({"instruction": "a", "prompts": ["a"]}, "prompts", "at least 20 items"),
        ({"instruction": "a", "prompts": ["a"] * 20}, "prompts", "20 chat prompts, 1 of them different"),
        (
            {"instruction": "a", "prompts": [*(["a"] * 20), *PROMPTS], "instruction_prompts": 30},
            "instruction_prompts",
            "of the first 30 prompts 11 are different; an instruction needs at least 20",
        ),
        ({"instruction": "a", "instruction_prompts": 5}, "instruction_prompts", "greater than or equal to 20"),
        ({"instruction": "a", "damping": -1}, "damping", "greater than or equal to 0"),
        ({"instruction": "a", "name": "../x"}, "name", "should match pattern"),
        ({"instruction": "a", "reward": "plain"}, "reward", "there is no such field"),
        ({"instruction": "a", "seed": 0.5}, "seed", "valid integer"),
    ],
)
def test_what_is_wrong_is_named_with_its_field_and_its_item(
    manager: TestClient, body: dict[str, Any], param: str, why: str
) -> None:
    # With escapes, as half of a pair can only come.
    content = json.dumps({"name": "mine", **body})
    response = manager.post("/v1/heads", content=content, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert error["param"] == param, error
    assert why in error["message"]


@pytest.fixture
def served(make_embedded_app: Callable[..., FastAPI]) -> Iterator[TestClient]:
    with TestClient(make_embedded_app(management_keys=MANAGER), headers=bearer(MANAGER)) as client:
        yield client


def start(client: TestClient, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/heads", json={"name": "mine", **body})
    assert response.status_code == 202, response.text
    assert response.headers["location"] == f"/v1/management/jobs/{response.json()['id']}"
    return response.json()


def result(client: TestClient, job: dict[str, Any]) -> dict[str, Any]:
    """The job once it has ended."""
    path = f"/v1/management/jobs/{job['id']}"
    assert eventually(lambda: client.get(path).json()["finished_at"] is not None, within_s=60)
    return client.get(path).json()


def of_command_line(source: dict[str, Any], folder: Path, flags: list[str]) -> bytes:
    """The tensors of the head that `recontrol train` makes of the same."""
    words = ["train", *flags, "--name", "mine", "--out", str(folder / "cli")]
    if "instruction" in source:
        lines = [{"id": f"prompts.{i}", "prompt": prompt} for i, prompt in enumerate(source["prompts"])]
        words += ["--instruction", source["instruction"], "--instruction-tokens", "4"]
        words += ["--prompts", write(folder / "prompts.jsonl", lines)]
        words += ["--contrast", source["contrast"]] if "contrast" in source else []
    else:
        ((kind, records),) = source.items()
        words += [f"--{kind}", write(folder / "mine.jsonl", records), "--rollouts", str(folder / "run")]
    assert main(words) == 0
    return (folder / "cli/mine/head.safetensors").read_bytes()


@pytest.mark.parametrize(
    "source",
    [{"pairs": CHAT}, {"texts": LABELLED}, SENTENCE, {**SENTENCE, "contrast": "Be rude."}],
    ids=["pairs", "texts", "instruction", "contrast"],
)
def test_a_head_made_over_http_is_to_the_bit_that_of_the_command_line_and_is_served_at_once(
    served: TestClient, source: dict[str, Any], workshop: tuple[list[str], Path], tmp_path: Path
) -> None:
    done = result(served, start(served, **source))
    assert (done["status"], done["error"]) == ("succeeded", None)
    assert done["progress"]["done"] == done["progress"]["of"] > 0
    expected = of_command_line(source, tmp_path, workshop[0])
    assert (tmp_path / "heads/mine/head.safetensors").read_bytes() == expected
    made, cli = (json.loads((tmp_path / place / "mine/card.json").read_text()) for place in ("heads", "cli"))
    assert made == {**done["result"]["card"], "command": "POST /v1/heads"}
    for card in (made, cli):
        del card["command"], card["description"], card["reward"]
        card["data"].get("given", {}).pop("file", None)
    assert made == cli
    body = {"model": "tiny@mine", "prompt": "hi", "max_tokens": 4}
    (choice,) = served.post("/v1/completions", json=body).json()["choices"]
    assert set(choice["control"]["value_after"]) == {"mine"}
    assert served.get("/v1/heads/mine").json()["reward"] == done["result"]["card"]["reward"]


def test_a_head_stays_after_a_restart_and_is_replaced_only_when_told_so(
    served: TestClient, make_embedded_app: Callable[..., FastAPI]
) -> None:
    assert result(served, start(served, pairs=CHAT))["status"] == "succeeded"
    with TestClient(make_embedded_app(management_keys=MANAGER), headers=bearer(MANAGER)) as again:
        assert "mine" in [head["id"] for head in again.get("/v1/heads").json()["data"]]
        again.post("/v1/management/heads/mine/unload")
        for name in ("plain", "mine"):
            response = again.post("/v1/heads", json={"name": name, "pairs": CHAT})
            assert (response.status_code, response.json()["error"]["param"]) == (409, "name")
        assert result(again, start(again, pairs=CHAT, replace=True))["status"] == "succeeded"


def test_texts_that_are_too_long_are_refused_before_anything_is_queued(served: TestClient) -> None:
    long = [*CHAT[:5], {"prompt": "a", "chosen": "x" * 300, "rejected": "y"}, *CHAT[5:]]
    response = served.post("/v1/heads", json={"name": "mine", "pairs": long})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "pairs.5")
    assert response.json()["error"]["message"].endswith("and cut_long cuts it")
    assert served.get("/v1/management/jobs").json()["data"] == []


def test_a_folder_that_cannot_be_written_is_told_before_the_work(
    served: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_options: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    response = served.post("/v1/heads", json={"name": "mine", "pairs": CHAT})
    assert (response.status_code, response.json()["error"]["code"]) == (409, "heads_read_only")
    assert "cannot be written (Read-only file system)" in response.json()["error"]["message"]


@pytest.mark.parametrize("replace", [False, True])
def test_what_is_in_the_way_of_a_heads_folder_is_told_before_the_work(
    served: TestClient, tmp_path: Path, replace: bool
) -> None:
    heads, elsewhere = tmp_path / "heads", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (heads / "mine").symlink_to(elsewhere)
    (heads / "lost").symlink_to(tmp_path / "nowhere")
    (heads / "notes").write_text("mine")
    for name, why in (("mine", "is a symbolic link"), ("lost", "is a symbolic link"), ("notes", "a file of the name")):
        response = served.post("/v1/heads", json={"name": name, "pairs": CHAT, "replace": replace})
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (409, "head_conflict", "name")
        assert why in error["message"]
    assert served.get("/v1/management/jobs").json()["data"] == []
    assert list(elsewhere.iterdir()) == []


def test_a_job_writes_through_no_link_that_came_while_it_ran(
    served: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    train = trainer.train_head

    def train_and_link(*given: Any) -> Any:
        (tmp_path / "heads/mine").symlink_to(tmp_path / "elsewhere")
        return train(*given)

    monkeypatch.setattr(trainer, "train_head", train_and_link)
    done = result(served, start(served, pairs=CHAT, replace=True))
    assert (done["status"], done["error"]["code"], done["error"]["param"]) == ("failed", "head_conflict", "name")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_job_that_saves_its_head_is_cancelled_too_late(served: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    is_saving, may_save = threading.Event(), threading.Event()
    save = trainer.save_head

    def save_when_told(*given: Any) -> None:
        is_saving.set()
        may_save.wait(30)
        save(*given)

    monkeypatch.setattr(trainer, "save_head", save_when_told)
    job = start(served, pairs=CHAT)
    assert is_saving.wait(30)
    response = served.post(f"/v1/management/jobs/{job['id']}/cancel")
    assert (response.status_code, response.json()["error"]["code"]) == (409, "cancelled_too_late")
    may_save.set()
    assert result(served, job)["status"] == "succeeded"


def test_the_fewest_prompts_that_are_allowed_make_a_head(served: TestClient) -> None:
    body = {"instruction": "Be kind.", "instruction_prompts": 20, "instruction_tokens": 4}
    done = result(served, start(served, **body))
    assert (done["status"], done["error"]) == ("succeeded", None)
    assert done["result"]["card"]["data"]["prompts"] == {"train": 16, "validation": 2, "test": 2}


def test_requests_get_the_same_tokens_while_a_job_runs_and_a_cancelled_job_leaves_nothing(
    served: TestClient, tmp_path: Path
) -> None:
    body = {"model": "tiny@positive", "prompt": "hello", "max_tokens": 40, "seed": 3, "ignore_eos": True, "n": 4}
    before = served.post("/v1/completions", json=body).json()["choices"]
    job = start(served, **{**SENTENCE, "instruction_tokens": 100})
    assert served.post("/v1/completions", json=body).json()["choices"] == before
    assert served.get(f"/v1/management/jobs/{job['id']}").json()["status"] == "running"
    started_s = time.monotonic()
    served.post(f"/v1/management/jobs/{job['id']}/cancel")
    assert result(served, job)["status"] == "cancelled"
    assert time.monotonic() - started_s < 3
    assert not (tmp_path / "heads/mine").exists()
    assert eventually(lambda: served.app.state.engine._core.has_work is False)  # type: ignore[attr-defined]


def test_a_server_does_not_wait_for_a_job_when_it_ends(make_embedded_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_embedded_app(management_keys=MANAGER), headers=bearer(MANAGER)) as client:
        start(client, **{**SENTENCE, "instruction_tokens": 100})
        time.sleep(0.2)
        started_s = time.monotonic()
    assert time.monotonic() - started_s < 3


def test_texts_that_take_too_much_memory_end_the_job(served: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "MAX_STATE_BYTES", 1000)
    done = result(served, start(served, pairs=CHAT))
    assert done["status"] == "failed"
    assert "give fewer or shorter texts" in done["error"]["message"]
