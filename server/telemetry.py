"""Every Prometheus collector, and the observer that feeds them. The only file that imports prometheus_client.

Names are `recontrol_*` with base units; label values come from the engine's own registry, never from a request. Knows
nothing of engines or HTTP. Enter at `Telemetry`; to add a runtime metric, add one collector.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    Summary,
    generate_latest,
)
from prometheus_client.registry import Collector

from server.control.state import HeldBy
from server.engines.base import EngineStatus
from server.types import FinishReason, GuardReport, TokenEdit

_PREFIX = "recontrol"
VLLM_METRICS = frozenset({
    "time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds",
    "request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds", "prompt_tokens",
    "generation_tokens", "request_success", "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc",
    "request_prompt_tokens", "request_generation_tokens", "num_preemptions", "prefix_cache_queries",
    "prefix_cache_hits",
})  # fmt: skip
"""What vLLM has as well, by the same name behind the prefix and with the same labels."""
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_INTER_TOKEN_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_EDIT_S = (50e-6, 100e-6, 250e-6, 500e-6, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
_KL_NATS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1)
_BUDGETS = (HeldBy.MAX_KL, HeldBy.MAX_RESPONSE_KL, HeldBy.MAX_SHIFT)
_SIGNS = ("positive", "negative")
JOB_ENDS = ("succeeded", "failed", "cancelled")
_RATIO = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1, 2)


class Telemetry:
    """Implements EngineObserver. `bind` names the model and its heads once they are known.

    `vllm_names` gives the metrics that vLLM has too under its names as well, for dashboards made for vLLM.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, *, vllm_names: bool = False) -> None:
        self._has_vllm_names = vllm_names
        self._registry = CollectorRegistry()
        self._model = ""
        self._heads: frozenset[str] = frozenset()
        self._ttft = self._histogram("time_to_first_token_seconds", "Arrival to first token", _SECONDS)
        self._inter_token = self._histogram("inter_token_latency_seconds", "Between tokens", _INTER_TOKEN_S)
        self._e2e = self._histogram("e2e_request_latency_seconds", "Arrival to last token", _SECONDS)
        self._queue = self._histogram("request_queue_time_seconds", "Arrival to first scheduling", _SECONDS)
        self._prefill = self._histogram("request_prefill_time_seconds", "First scheduling to first token", _SECONDS)
        self._decode = self._histogram("request_decode_time_seconds", "First token to last", _SECONDS)
        self._prompt_sizes = self._histogram("request_prompt_tokens", "Prompt tokens of a sequence", _TOKENS)
        self._generation_sizes = self._histogram("request_generation_tokens", "New tokens of a sequence", _TOKENS)
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens, as usage has them")
        self._generation_tokens = self._counter("generation_tokens", "New tokens, as usage has them")
        self._success = self._counter("request_success", "Finished sequences by reason", "finished_reason")
        self._running = self._gauge("num_requests_running", "Sequences that hold a slot")
        self._waiting = self._gauge("num_requests_waiting", "Sequences that wait for a slot")
        self._kv_usage = self._gauge("kv_cache_usage_perc", "Share of key-value positions in use, 0 to 1")
        self._growing = {
            "num_preemptions": self._counter("num_preemptions", "Sequences that gave up their pages and waited again"),
            "num_cache_queries": self._counter("prefix_cache_queries", "Prompt tokens looked for in the prompt cache"),
            "num_cache_hits": self._counter("prefix_cache_hits", "Prompt tokens found in the prompt cache"),
            "num_cache_evictions": self._counter("prefix_cache_evictions", "Pages of it whose place was needed"),
        }
        """By the field of EngineStatus, which counts since the engine's start."""
        self._grown = dict.fromkeys(self._growing, 0)
        self._responses = self._counter(
            "http_responses", "By route, status 499: the client has gone", "route", "status"
        )
        self._head_jobs = self._gauge("head_jobs", "Jobs that train a head and have not ended", "status")
        self._ended_jobs = self._counter("head_jobs_ended", "Jobs that trained a head, by how they ended", "status")
        self._edit_duration = self._histogram("edit_duration_seconds", "Edit and LM head of a controlled step", _EDIT_S)
        self._controlled = self._counter("controlled_tokens", "Tokens drawn under control", "head")
        self._value_before = self._histogram("value_before", "Head value before the edit", _value_buckets(), "head")
        self._value_after = self._histogram("value_after", "Head value after the edit", _value_buckets(), "head")
        self._sizes_before = self._sizes("value_before_magnitude", "Size of head value before the edit, by its sign")
        self._sizes_after = self._sizes("value_after_magnitude", "Size of head value after the edit, by its sign")
        self._kl = self._histogram("edit_kl", "KL from the base distribution, nats a token", _KL_NATS)
        self._shift = self._histogram("edit_shift_ratio", "Length of the shift over the state's", _RATIO)
        self._limited = self._counter("budget_limited_tokens", "Edits held back by a budget")
        self._nonfinite = self._counter("nonfinite_edits", "Edits dropped for not being finite")
        self._retries = self._counter("guardrail_retries", "Times that a guardrail drew again")
        self._replacements = self._counter("guardrail_replacements", "Responses that a guardrail ended with its text")
        self._taken_back = self._counter(
            "guardrail_taken_back_tokens", "Tokens that guardrails took back, not in usage"
        )

    def bind(self, model: str, heads: Iterable[str]) -> None:
        """Name the model and create every labelled series, so that they exist with zero from the start."""
        self._model = model
        for reason in FinishReason:
            self._success.labels(model, reason.value)
        for status in JOB_ENDS:
            self._ended_jobs.labels(model, status)
        self.set_head_jobs(queued=0, running=0)
        self.bind_heads(heads)
        for collector in (self._prompt_tokens, self._generation_tokens, self._limited, self._nonfinite,
                          self._retries, self._replacements, self._taken_back):  # fmt: skip
            collector.labels(model)
        self.on_step(EngineStatus(is_running=False, num_running=0, num_waiting=0, kv_cache_usage=0.0))

    def bind_heads(self, heads: Iterable[str]) -> None:
        """Name the heads anew, after one was loaded; the series of one that has gone stay, as counters do."""
        self._heads = self._heads | frozenset(heads)
        for head in self._heads:
            for collector in (self._controlled, self._value_before, self._value_after):
                collector.labels(self._model, head)
            for sizes, sign in itertools.product((self._sizes_before, self._sizes_after), _SIGNS):
                sizes.labels(self._model, head, sign)

    def render(self) -> bytes:
        """The exposition text for a scrape."""
        text = generate_latest(self._registry)
        return text + generate_latest(_VllmNames(self._registry)) if self._has_vllm_names else text

    def count_usage(self, *, prompt_tokens: int = 0, generation_tokens: int = 0) -> None:
        """What requests are told and charged as their `usage`. Not for engines to say: they also compute prompts once
        for each choice, and draw tokens that nobody hears of."""
        self._prompt_tokens.labels(self._model).inc(prompt_tokens)
        self._generation_tokens.labels(self._model).inc(generation_tokens)

    def on_first_token(self, *, queue_s: float, prefill_s: float, ttft_s: float) -> None:
        self._queue.labels(self._model).observe(queue_s)
        self._prefill.labels(self._model).observe(prefill_s)
        self._ttft.labels(self._model).observe(ttft_s)

    def on_token(self, *, inter_token_s: float | None, edit: TokenEdit | None) -> None:
        if inter_token_s is not None:
            self._inter_token.labels(self._model).observe(inter_token_s)
        if edit is None:
            return
        for head in self._heads & edit.value_before.keys():
            self._controlled.labels(self._model, head).inc()
            self._observe_value(self._value_before, self._sizes_before, head, edit.value_before[head])
            self._observe_value(self._value_after, self._sizes_after, head, edit.value_after[head])
        _observe_finite(self._kl.labels(self._model), edit.kl)
        _observe_finite(self._shift.labels(self._model), edit.shift_ratio)
        self._limited.labels(self._model).inc(edit.held_by in _BUDGETS)
        self._nonfinite.labels(self._model).inc(edit.is_nonfinite)

    def on_edit(self, *, duration_s: float) -> None:
        self._edit_duration.labels(self._model).observe(duration_s)

    def on_guardrail(self, report: GuardReport) -> None:
        self._retries.labels(self._model).inc(report.retries)
        self._replacements.labels(self._model).inc(report.replaced)
        self._taken_back.labels(self._model).inc(report.tokens_taken_back)

    def on_finish(
        self, *, reason: FinishReason, e2e_s: float, decode_s: float | None, prompt_tokens: int, generation_tokens: int
    ) -> None:
        self._success.labels(self._model, reason.value).inc()
        self._e2e.labels(self._model).observe(e2e_s)
        if decode_s is not None:
            self._decode.labels(self._model).observe(decode_s)
            self._prompt_sizes.labels(self._model).observe(prompt_tokens)
            self._generation_sizes.labels(self._model).observe(generation_tokens)

    def on_step(self, status: EngineStatus) -> None:
        self._running.labels(self._model).set(status.num_running)
        self._waiting.labels(self._model).set(status.num_waiting)
        self._kv_usage.labels(self._model).set(status.kv_cache_usage)
        for name, counter in self._growing.items():
            total = getattr(status, name)
            counter.labels(self._model).inc(max(total - self._grown[name], 0))
            self._grown[name] = total

    def set_head_jobs(self, *, queued: int, running: int) -> None:
        self._head_jobs.labels(self._model, "queued").set(queued)
        self._head_jobs.labels(self._model, "running").set(running)

    def count_head_job(self, status: str) -> None:
        """`status` is one of JOB_ENDS."""
        self._ended_jobs.labels(self._model, status).inc()

    def count_response(self, route: str | None, status: int) -> None:
        """`route` is the template of one that there is, such as /v1/management/heads/{name}/load; None for no other."""
        self._responses.labels(self._model, route or "none", str(status)).inc()

    def _observe_value(self, values: Histogram, sizes: Summary, head: str, value: float) -> None:
        _observe_finite(values.labels(self._model, head), value)
        _observe_finite(sizes.labels(self._model, head, _SIGNS[value < 0]), abs(value))

    def _sizes(self, name: str, text: str) -> Summary:
        """What a histogram with bounds below zero has no sum for: a sum that can fall is no counter, and `rate` would
        take each fall for a restart. One sum for each sign only grows; the mean is their difference over both counts.
        """
        return Summary(f"{_PREFIX}_{name}", text, ("model_name", "head", "sign"), registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"{_PREFIX}_{name}", text, ("model_name", *labels), buckets=buckets, registry=self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{_PREFIX}_{name}", text, ("model_name", *labels), registry=self._registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"{_PREFIX}_{name}", text, ("model_name", *labels), registry=self._registry)


class _VllmNames(Collector):
    """The collectors that vLLM has too, under `vllm:*`: the same values, read when they are scraped."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            name = metric.name.removeprefix(f"{_PREFIX}_")
            if name in VLLM_METRICS:
                renamed = Metric(f"vllm:{name}", metric.documentation, metric.type)
                renamed.samples = [
                    sample._replace(name=sample.name.replace(f"{_PREFIX}_", "vllm:", 1)) for sample in metric.samples
                ]
                yield renamed


def _observe_finite(collector: Histogram | Summary, value: float) -> None:
    """One NaN would make a sum NaN for good; `nonfinite_edits_total` counts what is left out here."""
    if math.isfinite(value):
        collector.observe(value)


def _value_buckets() -> tuple[float, ...]:
    """Rewards differ in range; these serve sentiment and ease in -1..1 as well as lengths in tens of words."""
    return (-10, -5, -2, -1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1, 2, 5, 10)
