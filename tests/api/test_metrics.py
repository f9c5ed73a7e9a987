import logging
from collections.abc import Callable

import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from server.engines.base import EngineStatus
from server.telemetry import VLLM_METRICS, Telemetry
from tests.api.conftest import chat, complete

NAMES = {
    "time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds",
    "request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds", "prompt_tokens",
    "generation_tokens", "request_success", "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc",
    "request_prompt_tokens", "request_generation_tokens", "edit_duration_seconds", "controlled_tokens",
    "value_before", "value_after", "value_before_magnitude", "value_after_magnitude", "edit_kl", "edit_shift_ratio",
    "budget_limited_tokens", "nonfinite_edits", "num_preemptions", "prefix_cache_queries", "prefix_cache_hits",
    "prefix_cache_evictions", "http_responses", "guardrail_retries", "guardrail_replacements",
    "guardrail_taken_back_tokens",
}  # fmt: skip


def scrape(client: TestClient) -> dict[tuple[str, str], float]:
    """(sample name, value of its second label) -> value, read by prometheus_client's own parser."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {
        (sample.name, next((v for k, v in sample.labels.items() if k != "model_name"), "")): sample.value
        for family in families
        for sample in family.samples
    }


def test_the_exposition_parses_and_has_every_metric_from_the_start(make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app()) as client:
        text = client.get("/metrics").text
        names = {family.name for family in text_string_to_metric_families(text)}
        assert names >= {f"recontrol_{name}" for name in NAMES}
        assert scrape(client)["recontrol_controlled_tokens_total", "plain"] == 0
        assert scrape(client)["recontrol_request_success_total", "stop"] == 0


def test_tokens_requests_and_controlled_tokens_are_counted(make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app()) as client:
        complete(client, max_tokens=5)
        complete(client, max_tokens=7, model="fake@plain")
        counts = scrape(client)
    assert counts["recontrol_generation_tokens_total", ""] == 12
    assert counts["recontrol_prompt_tokens_total", ""] == 10
    assert counts["recontrol_request_success_total", "length"] == 2
    assert counts["recontrol_controlled_tokens_total", "plain"] == 7
    assert counts["recontrol_controlled_tokens_total", "positive"] == 0
    assert counts["recontrol_time_to_first_token_seconds_count", ""] == 2


def test_responses_are_counted_by_route_and_status_and_what_is_no_route_is_one(
    make_app: Callable[..., FastAPI],
) -> None:
    with TestClient(make_app(settings={"max_body_bytes": 2048})) as client:
        complete(client)
        complete(client, max_tokens=-1)
        complete(client, prompt="a" * 3000)
        for path in ("/a", "/b", "/v1/models", "/v1/models/fake"):
            client.get(path)
        families = text_string_to_metric_families(client.get("/metrics").text)
        (responses,) = (family for family in families if family.name == "recontrol_http_responses")
    counts = {(s.labels["route"], s.labels["status"]): s.value for s in responses.samples if s.name.endswith("_total")}
    assert counts == {
        ("/v1/completions", "200"): 1, ("/v1/completions", "400"): 1, ("none", "413"): 1, ("none", "404"): 2,
        ("/v1/models", "200"): 1, ("/v1/models/{model_id:path}", "200"): 1,
    }  # fmt: skip


def test_what_an_engine_counts_since_its_start_is_counted_on() -> None:
    telemetry = Telemetry()
    telemetry.bind("m", [])
    for total in (2, 2, 5):
        telemetry.on_step(EngineStatus(True, 0, 0, 0.0, num_preemptions=total, num_cache_hits=10 * total))
    text = telemetry.render().decode()
    assert 'recontrol_num_preemptions_total{model_name="m"} 5.0' in text
    assert 'recontrol_prefix_cache_hits_total{model_name="m"} 50.0' in text


def test_a_name_from_a_request_never_becomes_a_label(make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app()) as client:
        complete(client, model="fake@<script>", user="evil-user")
        text = client.get("/metrics").text
    assert "script" not in text
    assert "evil" not in text


def test_vllms_names_have_the_same_values_and_labels_when_asked_for(make_app: Callable[..., FastAPI]) -> None:
    with TestClient(make_app(settings={"vllm_metrics": True})) as client:
        complete(client, max_tokens=5)
        text = client.get("/metrics").text
    families = [f for f in text_string_to_metric_families(text) if not f.name.endswith("_created")]
    ours = {family.name: family for family in families if family.name.startswith("recontrol_")}
    vllms = {family.name.removeprefix("vllm:"): family for family in families if family.name.startswith("vllm:")}
    assert set(vllms) == VLLM_METRICS
    for name, family in vllms.items():
        mine = ours[f"recontrol_{name}"]
        assert (family.type, family.documentation) == (mine.type, mine.documentation)
        assert [(s.name.removeprefix("vllm:"), s.labels, s.value) for s in family.samples] == [
            (s.name.removeprefix("recontrol_"), s.labels, s.value) for s in mine.samples
        ]
    assert {sample.value for sample in vllms["generation_tokens"].samples} == {5}


def test_vllms_names_are_absent_unless_asked_for(client: TestClient) -> None:
    assert "vllm:" not in client.get("/metrics").text


def test_inter_token_buckets_are_fine_enough_for_small_models(client: TestClient) -> None:
    complete(client, max_tokens=2)
    families = text_string_to_metric_families(client.get("/metrics").text)
    family = next(family for family in families if family.name == "recontrol_inter_token_latency_seconds")
    assert min(float(sample.labels["le"]) for sample in family.samples if "le" in sample.labels) <= 0.002


def test_two_telemetries_do_not_share_anything() -> None:
    first, second = Telemetry(), Telemetry()
    first.bind("m", ["h"])
    assert b'head="h"' in first.render()
    assert b'head="h"' not in second.render()


SEARCHED = {"objective": {"weights": {"positive": 1.0}}, "search": {"type": "blocks", "candidates": 3}}
BODIES = [
    {"prompt": ["hello", "hi"], "n": 3, "max_tokens": 5},
    {
        "prompt": "hello",
        "n": 2,
        "best_of": 4,
        "max_tokens": 6,
        "control": {"objective": {"weights": {"positive": 1.0}}},
    },
    {"prompt": "hello", "control": SEARCHED, "max_tokens": 9},
    {"prompt": "hello", "echo": True, "logprobs": 0, "max_tokens": 0},
    {"prompt": "hello", "n": 2, "stream": True, "max_tokens": 7},
    {"prompt": "hello", "n": 2, "max_tokens": 200, "timeout_s": 0.001},
    {"prompt": "hello", "max_tokens": 10**6},
]


@pytest.mark.parametrize("engine", ["fake", "embedded"])
def test_the_counters_are_the_sums_of_usage_whatever_was_asked_for(
    engine: str, make_app: Callable[..., FastAPI], make_embedded_app: Callable[..., FastAPI],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO, "recontrol.access")
    app, model = (make_app(), "fake") if engine == "fake" else (make_embedded_app(), "tiny")
    with TestClient(app) as client:
        answers = [complete(client, model=model, **body) for body in BODIES] + [chat(client, model=model, max_tokens=4)]
        counts = scrape(client)
    facts = [record.__dict__["fields"] for record in caplog.records if "fields" in record.__dict__]
    told = [answer.json()["usage"] for answer in answers if answer.status_code == 200 and answer.text[0] == "{"]
    assert len(told) == 5
    for kind, counter in (("prompt_tokens", "prompt_tokens"), ("completion_tokens", "generation_tokens")):
        logged = [one[kind] for one in facts if kind in one]
        assert counts[f"recontrol_{counter}_total", ""] == sum(logged) > 0
        assert {usage[kind] for usage in told} <= set(logged)
