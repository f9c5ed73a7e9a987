"""The default model with the shipped heads, over HTTP, as users use it."""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.tool_calls import TOOLS, verdict
from server.app import create_app
from server.control.objectives import Instruction
from server.control.params import ControlParams
from server.control.registry import HeadRegistry
from server.engines.checkpoint.packaged import default_model_folder
from server.engines.embedded.core import EngineCore
from server.engines.embedded.model.loader import load_model
from server.settings import DEFAULT_MODEL, Settings
from server.types import GenerationRequest, SamplingParams
from tests.api.conftest import serving
from tests.conftest import run
from tests.pages.pages import PAGES, blocks, curl_bodies, text_of
from value_models.rewards import positive

pytestmark = pytest.mark.slow
HEADS = {"brevity", "neutral", "nontoxic", "plain", "positive", "relevance"}
ROOT = Path(__file__).parent.parent
CHEER = "Always answer cheerfully."
PROMPTS = ["Tell me about cats.", "My flight was cancelled.", "How does a bridge stand?", "Write a note to my boss."]
CONTROLS: list[dict[str, Any] | None] = [
    None,
    {"objective": {"type": "weighted_sum", "weights": {"positive": 1.0}}, "max_kl": 0.3},
    {"objective": {"weights": {"plain": 1.0, "neutral": 0.5}}},
    {"objective": {"weights": {"positive": -1.0}}, "max_kl": 0.1, "steps": 3},
    {"objective": {"weights": {"neutral": 1.0}}, "step_size": 5.0},
    {"objective": {"weights": {"brevity": 0.5, "nontoxic": 0.5, "relevance": 1.0}}},
]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(create_app(Settings(max_batch_size=32, search_rewards=("positive",)))) as url:
        yield url


SDK_SAMPLES = [
    pytest.param(code, id=f"{page}-{index}")
    for page in PAGES
    for index, code in enumerate(blocks(text_of(page), "python"))
    if "import OpenAI" in code
]


@pytest.mark.parametrize("code", SDK_SAMPLES)
def test_every_sample_of_the_sdk_on_a_page_runs_as_it_is_written(
    url: str, code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "http://127.0.0.1:8000" in code
    exec(
        compile(code.replace("http://127.0.0.1:8000", url), "sample", "exec", dont_inherit=True), {"__name__": "sample"}
    )
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("program", "flags", "shown"),
    [
        ("sdk_control", [], "positive and plain: "),
        ("instruction_guidance", [], "weight 1 and positive: "),
        ("guardrail", ["--bound", "1.5"], "finish reason: content_filter"),
        ("best_of_value", ["--candidates", "3"], "+0."),
        ("tool_calling", [], "get_weather({"),
        ("watch_metrics", ["--seconds", "0"], "No tokens were drawn under control."),
    ],
)
def test_an_example_runs_as_it_is_written(url: str, program: str, flags: list[str], shown: str) -> None:
    command = [sys.executable, ROOT / f"examples/{program}.py", "--url", url, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert shown in done.stdout, done.stdout


def ask(index: int, *, n: int = 1) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": DEFAULT_MODEL,
        "messages": [{"role": "user", "content": PROMPTS[index % len(PROMPTS)]}],
        "max_tokens": 12 + index % 9,
        "temperature": [1.0, 0.7, 0.0][index % 3],
        "top_p": 0.95,
        "seed": index,
        "n": n,
    }
    if (control := CONTROLS[index % len(CONTROLS)]) is not None:
        body["control"] = control
    return body


def test_thirty_two_concurrent_requests_with_mixed_objectives_each_equal_the_same_request_alone(url: str) -> None:
    async def all_at_once() -> list[Any]:
        async with httpx.AsyncClient(base_url=url, timeout=300) as client:
            posts = [client.post("/v1/chat/completions", json=ask(i)) for i in range(32)]
            return [response.json() for response in await asyncio.gather(*posts)]

    together = asyncio.run(all_at_once())
    with httpx.Client(base_url=url, timeout=300) as client:
        alone = [client.post("/v1/chat/completions", json=ask(i)).json() for i in range(32)]
    for i in range(32):
        assert together[i]["choices"] == alone[i]["choices"], i


def test_the_openai_sdk_completes_with_and_without_control_streaming_and_not(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        texts = []
        for extra in (None, {"control": CONTROLS[1]}):
            options: dict[str, Any] = {"model": DEFAULT_MODEL, "prompt": "The film was", "max_tokens": 16, "seed": 2}
            whole = client.completions.create(**options, extra_body=extra)
            stream = client.completions.create(**options, stream=True, extra_body=extra)
            assert "".join(event.choices[0].text for event in stream) == whole.choices[0].text
            texts.append(whole.choices[0].text)
        assert texts[0] != texts[1]


def test_the_positive_head_makes_text_more_positive_and_the_budget_holds(url: str) -> None:
    means = []
    with httpx.Client(base_url=url, timeout=300) as client:
        for model in (DEFAULT_MODEL, f"{DEFAULT_MODEL}@positive"):
            choices = []
            for index in range(4):
                body = {"model": model, "messages": [{"role": "user", "content": PROMPTS[index]}], "n": 8, "seed": 5}
                choices += client.post("/v1/chat/completions", json={**body, "max_tokens": 40}).json()["choices"]
            means.append(statistics.mean(positive([], [choice["message"]["content"] for choice in choices])))
            assert all(choice["control"]["max_kl"] <= 0.3 for choice in choices if "control" in choice)
    assert means[1] > means[0] + 0.1


def test_a_response_is_the_chats_text_and_control_raises_its_value(url: str) -> None:
    """By what the example on the page sends."""
    (example,) = [body for path, body in curl_bodies(text_of(ROOT / "docs/http-api.md")) if path == "/v1/responses"]
    asked = {**json.loads(example), "max_output_tokens": 24, "temperature": 0}
    told = httpx.post(f"{url}/v1/responses", json=asked, timeout=60).json()
    messages = [
        {"role": "system", "content": asked.pop("instructions")},
        {"role": "user", "content": asked.pop("input")},
    ]
    max_tokens = asked.pop("max_output_tokens")
    body = {**asked, "messages": messages, "max_tokens": max_tokens}
    (choice,) = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()["choices"]
    assert told["output"][0]["content"][0]["text"] == choice["message"]["content"]
    assert told["control"] == choice["control"]
    assert told["control"]["value_after"]["positive"] > told["control"]["value_before"]["positive"]


def test_a_positive_text_and_a_positive_answer_score_above_negative_ones(url: str) -> None:
    """By what the example on the page sends, too."""
    (example,) = [body for path, body in curl_bodies(text_of(ROOT / "docs/http-api.md")) if path == "/v1/value"]
    texts = ["What a wonderful day, I love all of it!", "This is horrible. I hate every minute of it."]
    question = {"role": "user", "content": "What do you think of the film?"}
    answers = ["It is a delight from beginning to end.", "It is a stupid and ugly mess."]
    chats = [[question, {"role": "assistant", "content": answer}] for answer in answers]
    for body in (
        json.loads(example),
        {"model": f"{DEFAULT_MODEL}@positive", "input": texts},
        {"model": DEFAULT_MODEL, "messages": chats},
    ):
        response = httpx.post(f"{url}/v1/value", json=body)
        better, worse = (datum["values"]["positive"] for datum in response.json()["data"])
        assert better > worse + 0.1


MOVIE = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 40},
        "year": {"type": "integer", "minimum": 1900, "maximum": 2030},
        "genres": {"type": "array", "items": {"enum": ["comedy", "drama", "horror"]}, "minItems": 1, "maxItems": 2},
        "director": {"anyOf": [{"type": "string", "maxLength": 30}, {"type": "null"}]},
    },
    "required": ["title", "year", "genres", "director"],
    "additionalProperties": False,
}


def test_texts_of_twenty_seeds_hold_a_schema_with_control_and_without(url: str) -> None:
    texts = []
    with httpx.Client(base_url=url, timeout=300) as client:
        for control in (None, CONTROLS[1]):
            body: dict[str, Any] = {
                "model": DEFAULT_MODEL,
                "messages": [{"role": "user", "content": "Describe a film as JSON."}],
                "max_tokens": 150,
                "n": 20,
                "seed": 1,
                "response_format": {"type": "json_schema", "json_schema": {"name": "movie", "schema": MOVIE}},
                "control": control,
            }
            choices = client.post("/v1/chat/completions", json=body).json()["choices"]
            texts.append([choice["message"]["content"] for choice in choices])
            for choice, text in zip(choices, texts[-1], strict=True):
                assert choice["finish_reason"] == "stop"
                jsonschema.validate(json.loads(text), MOVIE)
            assert all(choice["control"]["max_kl"] <= 0.3 for choice in choices if "control" in choice)
    assert len({*texts[0], *texts[1]}) > 20


def test_forced_calls_parse_and_control_leaves_them_as_they_are(url: str) -> None:
    made = []
    with httpx.Client(base_url=url, timeout=300) as client:
        for control in (None, CONTROLS[1]):
            body: dict[str, Any] = {
                "model": DEFAULT_MODEL,
                "messages": [{"role": "user", "content": "How is the weather in Bern?"}],
                "tools": TOOLS,
                "tool_choice": "required",
                "max_tokens": 256,
                "temperature": 0.7,
                "n": 8,
                "seed": 1,
                "control": control,
            }
            choices = client.post("/v1/chat/completions", json=body | {"parallel_tool_calls": False}).json()["choices"]
            assert [verdict(choice) for choice in choices] == [None] * 8
            made.append([choice["message"]["tool_calls"][0]["function"] for choice in choices])
    assert made[0] == made[1]


def test_an_agents_turn_goes_through_the_template_of_a_model_without_tools(url: str) -> None:
    called = {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "set_timer", "arguments": "{}"}}]}
    messages = [{"role": "user", "content": "hi"}, called, {"role": "tool", "tool_call_id": "a", "content": "done"}]
    body = {"messages": messages, "tools": TOOLS}
    with httpx.Client(base_url=url, timeout=300) as client:
        told = client.post("/tokenize", json=body).json()["tokens"]
        prompt = client.post("/detokenize", json={"tokens": told}).json()["prompt"]
    assert prompt.startswith("<|im_start|>system\nYou can call these functions")
    assert prompt.endswith(
        'assistant\n<tool_call>\n{"name": "set_timer", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\ndone\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_best_of_four_blocks_end_with_higher_values_than_one_and_the_text_follows(url: str) -> None:
    ends, rewards = [], []
    with httpx.Client(base_url=url, timeout=300) as client:
        for candidates in (1, 4):
            control = {
                "objective": {"weights": {"positive": 1.0}},
                "steps": 0,
                "search": {"type": "blocks", "candidates": candidates},
                "trace": True,
            }
            choices = []
            for index in range(4):
                body = {**ask(index, n=4), "temperature": 1.0, "max_tokens": 40, "control": control}
                answer = client.post("/v1/chat/completions", json=body).json()
                choices += answer["choices"]
                tokens = sum(len(choice["control_trace"]) for choice in answer["choices"])
                assert answer["usage"]["completion_tokens"] >= tokens * candidates * 0.9
            ends.append(statistics.mean(choice["control_trace"][-1]["value_before"]["positive"] for choice in choices))
            rewards.append(statistics.mean(positive([], [choice["message"]["content"] for choice in choices])))
    assert ends[1] > ends[0] + 0.1
    assert rewards[1] > rewards[0]


def test_best_of_over_http_returns_those_of_highest_value(url: str) -> None:
    control = {"objective": {"weights": {"positive": 1.0}}, "steps": 0, "trace": True}
    body = {"model": DEFAULT_MODEL, "prompt": "The film was", "max_tokens": 24, "seed": 4, "control": control}
    with httpx.Client(base_url=url, timeout=300) as client:
        everything = client.post("/v1/completions", json={**body, "n": 8}).json()
        best = client.post("/v1/completions", json={**body, "n": 2, "best_of": 8}).json()
    assert {choice["text"] for choice in best["choices"]} < {choice["text"] for choice in everything["choices"]}
    assert best["usage"] == everything["usage"]
    kept, all_of_them = (
        [choice["control_trace"][-1]["value_before"]["positive"] for choice in answer["choices"]]
        for answer in (best, everything)
    )
    assert statistics.mean(kept) > statistics.mean(all_of_them)


def test_metrics_are_read_by_prometheus_clients_parser(url: str) -> None:
    families = {family.name: family for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text)}
    heads = {
        sample.labels["head"] for sample in families["recontrol_controlled_tokens"].samples if "head" in sample.labels
    }
    assert heads == HEADS
    assert families["recontrol_time_to_first_token_seconds"].type == "histogram"


def test_a_chat_with_every_role_is_rendered_and_continued_in_the_models_template(url: str) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "system", "content": "Count.", "name": "me"},
        {"role": "assistant", "content": "One, two, three, "},
    ]
    goes_on = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    with httpx.Client(base_url=url, timeout=300) as client:
        tokens = client.post("/tokenize", json=goes_on).raise_for_status().json()["tokens"]
        text = client.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
        limits = {"model": DEFAULT_MODEL, "max_tokens": 8, "temperature": 0}
        as_chat = client.post("/v1/chat/completions", json={**goes_on, **limits}).json()
        as_text = client.post("/v1/completions", json={"prompt": text, "add_special_tokens": False, **limits}).json()
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne\ntwo<|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|>\n"
        "<|im_start|>system\nCount.<|im_end|>\n<|im_start|>assistant\nOne, two, three, "
    )
    assert as_chat["choices"][0]["message"]["content"] == as_text["choices"][0]["text"]


def test_seed_minus_one_gives_another_text_each_time(url: str) -> None:
    body = {"model": DEFAULT_MODEL, "prompt": "The film was", "max_tokens": 16, "temperature": 1.5, "seed": -1}
    texts = [httpx.post(f"{url}/v1/completions", json=body, timeout=300).json()["choices"][0]["text"] for _ in range(2)]
    assert texts[0] != texts[1]


def test_a_search_by_a_reward_raises_it_above_a_head_alone(url: str) -> None:
    """By eight candidates for each block of eight tokens, judged by what VADER says of the text so far."""
    body = {"model": "SmolLM2-135M-Instruct", "prompt": "The new library in our town", "max_tokens": 32, "seed": 3,
            "control": {"objective": {"weights": {"positive": 0.0}}, "steps": 0}}  # fmt: skip
    searched = {**body["control"], "search": {"type": "blocks", "candidates": 8, "reward": "positive"}}
    texts = [
        httpx.post(f"{url}/v1/completions", json={**body, "control": control}, timeout=120).json()["choices"][0]["text"]
        for control in (body["control"], searched)
    ]
    plain, best = positive([""] * 2, texts)
    assert best > max(plain, 0.3)


@pytest.fixture(scope="module")
def in_float32() -> tuple[Any, EngineCore]:
    """The model by transformers and by this engine."""
    plain = AutoModelForCausalLM.from_pretrained(default_model_folder(), dtype=torch.float32)
    return plain, EngineCore(load_model(DEFAULT_MODEL, dtype="float32"), HeadRegistry({}), max_batch_size=2)


def greedy(plain: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    whole = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    return whole[0, len(prompt) :].tolist()


def test_greedy_text_in_float32_is_that_of_transformers_generate(in_float32: tuple[Any, EngineCore]) -> None:
    plain, core = in_float32
    prompt = AutoTokenizer.from_pretrained(default_model_folder())("The three laws of motion are")["input_ids"]
    request = GenerationRequest("r", tuple(prompt), SamplingParams(max_tokens=24, temperature=0.0))
    assert run(core, [request])["r", 0].token_ids == greedy(plain, prompt)


def test_an_instruction_of_weight_one_gives_greedily_what_transformers_gives_after_the_system_message(
    in_float32: tuple[Any, EngineCore],
) -> None:
    plain, core = in_float32
    tokenizer = AutoTokenizer.from_pretrained(default_model_folder())
    system, user = ({"role": role, "content": text} for role, text in (("system", CHEER), ("user", PROMPTS[1])))
    bare, instructed = (
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        for messages in ([user], [system, user])
    )
    free = ControlParams.without_limits(Instruction(type="instruction", text=CHEER), step_size=1.0, steps=1)
    request = GenerationRequest(
        "r", tuple(bare), SamplingParams(max_tokens=24, temperature=0.0), free, instructed_token_ids=tuple(instructed)
    )
    told = run(core, [request])["r", 0].token_ids
    assert told == greedy(plain, instructed)
    assert told != greedy(plain, bare)


def test_following_an_instruction_over_http_moves_answers_within_the_budget(url: str) -> None:
    objective = {"type": "instruction", "text": CHEER, "weight": 3.0}
    for index in range(3):
        bodies = [ask(index), ask(index) | {"control": {"objective": objective, "max_kl": 0.2}}]
        answers = [httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120).json() for body in bodies]
        base, guided = (answer["choices"][0] for answer in answers)
        assert 0 < guided["control"]["mean_kl"] <= guided["control"]["max_kl"] <= 0.2
        assert guided["message"] != base["message"]
