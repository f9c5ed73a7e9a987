"""Bodies that once reached an engine or a tokenizer they should not have, and streams that differed from the whole."""

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

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
