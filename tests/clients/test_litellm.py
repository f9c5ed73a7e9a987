"""LiteLLM's SDK against the default model, and OpenAI's SDK against LiteLLM's proxy in front of it."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from benchmarks.speed.servers import Server, free_port
from server.settings import DEFAULT_MODEL
from tests.clients.conftest import OFFLINE, python_of, run_python

pytestmark = pytest.mark.clients
CONTROL = {"control": {"objective": {"weights": {"positive": 1.0}}, "max_kl": 0.3, "trace": True}}
CHAT: Any = {"model": "fruity", "messages": [{"role": "user", "content": "Name a fruit."}], "max_tokens": 8}


@pytest.fixture(scope="module")
def answers(default_server: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cwd = tmp_path_factory.mktemp("litellm")
    return run_python(".venv-litellm", "litellm", "litellm_calls.py", f"{default_server}/v1", DEFAULT_MODEL, cwd=cwd)


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_the_sdk_asks_alike_by_either_provider(answers: dict[str, Any], provider: str) -> None:
    found = answers[provider]
    assert found["whole"] == found["streamed"] == found["async"] != found["controlled"]
    assert found["streamed_usage"] == [found["usage"]] == [8]
    assert found["finish"] == found["given_back"] == found["dropped"] == "length"
    assert {found["parsed"]["colour"], found["called"]["colour"]} <= {"red", "green"}
    assert answers["text"]["whole"] == answers["text"]["streamed"]


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_our_errors_are_litellms_own(answers: dict[str, Any], provider: str) -> None:
    names = {"model": "NotFoundError", "field": "BadRequestError", "context": "ContextWindowExceededError"}
    assert answers[provider]["errors"] == names


@pytest.fixture(scope="module")
def proxy(default_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder = tmp_path_factory.mktemp("proxy")
    served = {"model": f"openai/{DEFAULT_MODEL}", "api_base": f"{default_server}/v1", "api_key": "none"}
    models = [{"model_name": "fruity", "litellm_params": served}]
    config = {"model_list": models, "litellm_settings": {"drop_params": True}}
    # Otherwise one caller's mistake of a name, a 404, keeps everyone from the server for some seconds.
    config |= {"router_settings": {"disable_cooldowns": True}}
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML.
    python, port, key = python_of(".venv-litellm", "litellm"), free_port(), f"sk-{secrets.token_hex(32)}"
    command = [str(python.with_name("litellm")), "--config", str(folder / "config.yaml"), "--port", str(port)]
    env = {**OFFLINE, "LITELLM_MASTER_KEY": key}
    server = Server([*command, "--host", "127.0.0.1"], port, env=env, log=folder / "log")
    try:
        with httpx.Client(base_url=server.url) as probe:
            server.wait_until(probe, "/health/liveliness", timeout_s=200)
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
            yield client
    finally:
        server.end()


def test_behind_the_proxy_chats_are_whole_and_streamed_with_control(proxy: openai.OpenAI) -> None:
    whole = proxy.chat.completions.create(**CHAT, temperature=0)
    events = list(proxy.chat.completions.create(**CHAT, temperature=0, stream=True))
    texts = [choice.delta.content or "" for event in events for choice in event.choices]
    assert "".join(texts) == whole.choices[0].message.content
    assert len(texts) > 4
    assert whole.usage
    assert whole.usage.completion_tokens == 8
    controlled = proxy.chat.completions.create(**CHAT, temperature=0, extra_body=CONTROL)
    assert controlled.choices[0].message.content != whole.choices[0].message.content


def test_behind_the_proxy_errors_are_those_of_the_server(proxy: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        proxy.chat.completions.create(**CHAT, temperature=9)
    with pytest.raises(openai.BadRequestError, match="maximum context length is 8192 tokens"):
        proxy.chat.completions.create(**{**CHAT, "max_tokens": 9000})
    with pytest.raises(openai.NotFoundError, match="no value head 'nothing'"):
        proxy.chat.completions.create(**CHAT, extra_body={"control": {"objective": {"weights": {"nothing": 1.0}}}})


def test_the_proxy_drops_what_the_model_is_not_known_to_take(proxy: openai.OpenAI) -> None:
    answer = proxy.chat.completions.create(**CHAT, temperature=0, extra_body={"thinking": {"type": "enabled"}})
    assert answer.choices[0].finish_reason == "length"
