"""What the pages show to copy is accepted as it is written: control, requests and a reward."""

import json
from typing import Any, get_args

import pytest
from starlette.testclient import TestClient

from server.app import create_app
from server.control.objectives import BaseObjective
from server.control.params import ControlParams
from server.engines.fake import FakeEngine
from server.settings import DEFAULT_MODEL, Settings
from server.training.request import HeadRequest
from tests.pages.pages import PAGES, blocks, curl_bodies, text_of
from value_models.store import CARD_FILE, shipped_heads_folder

HEADS = [path.parent.name for path in shipped_heads_folder(DEFAULT_MODEL).glob(f"*/{CARD_FILE}")]
CONTROLS = [json.loads(block) for block in blocks(text_of("docs/control.md"), "json")]
REQUESTS = [
    pytest.param(path, body, id=f"{page}-{index}")
    for page in PAGES
    for index, (path, body) in enumerate(curl_bodies(text_of(page)))
    if path != "/v1/heads"
]


def fake_client() -> TestClient:
    return TestClient(create_app(Settings(), engine=FakeEngine(heads=HEADS, rewards=["positive"])))


@pytest.mark.parametrize(
    "control", CONTROLS, ids=lambda control: "-".join([control["objective"].get("type", ""), *control])
)
def test_every_example_of_control_is_accepted_as_it_is_written(control: dict[str, Any]) -> None:
    # A chat, since a completion has no turns.
    body = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "control": control}
    with fake_client() as client:
        response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    assert set(response.json()["choices"][0]["control"]["value_after"]) == set(ControlParams(**control).head_names)


def test_every_objective_and_every_condition_has_an_example() -> None:
    types = {get_args(model.model_fields["type"].annotation)[0] for model in BaseObjective.__subclasses__()}
    assert {control["objective"].get("type", "weighted_sum") for control in CONTROLS} == types
    conditions = set(ControlParams.model_fields) - {"objective", "max_shift", "trace"}
    assert {field for control in CONTROLS for field in control} - {"objective"} == conditions


@pytest.mark.parametrize(("path", "sent"), REQUESTS)
def test_every_request_that_a_page_sends_with_curl_is_accepted(path: str, sent: str) -> None:
    body = {**json.loads(sent), "model": "fake"}
    if arguments := body.pop("vllm_xargs", None):  # for vLLM's own server, which hands them on as text
        body["control"] = json.loads(arguments["recontrol"])
    with fake_client() as client:
        response = client.post(path, json=body)
    assert response.status_code == 200, response.text


def test_the_request_that_trains_a_head_makes_what_it_says() -> None:
    (sent,) = [body for path, body in curl_bodies(text_of("docs/access.md")) if path == "/v1/heads"]
    recipe = HeadRequest.model_validate_json(sent).recipe()
    assert (recipe.name, recipe.source.method, recipe.source.num_texts) == ("cheerful", "instruction", 400)


def test_there_are_requests_to_copy_on_the_readme_and_the_pages_for_clients() -> None:
    pages = {str(param.id).rpartition("-")[0] for param in REQUESTS}
    assert {"README.md", "docs/quickstart.md", "docs/http-api.md", "docs/vllm.md"} <= pages


def test_the_reward_that_the_page_on_heads_shows_is_one() -> None:
    (code,) = [block for block in blocks(text_of("docs/heads.md"), "python") if block.startswith("# mine.py")]
    module: dict[str, Any] = {}
    exec(code, module)
    assert module["kindness"](["hi", "hi"], ["Thank you, I am glad.", "No."]) == [2.0, 0.0]
