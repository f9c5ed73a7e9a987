"""The study itself: a server in this process, every way to guard on the same prompts and seeds. Enter at `measure`.

Shapes: P prompts, S responses to each.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from fastapi import FastAPI

from benchmarks.guard.arms import NO_GUARD, arms
from benchmarks.guard.detection import Watched, bound_for, detection
from server.app import create_app
from server.control.repair import DEFAULT_REPLACEMENT
from server.settings import Settings
from value_models.intervals import mean_interval
from value_models.metrics import profane_spans
from value_models.prompt_sets import RolloutPrompt

_WAIT_S = 3600.0
_BATCH = 32
"""Prompts of one request, which is bounded in what it may tell."""


@dataclass(slots=True, frozen=True)
class Prompts:
    risky: Sequence[RolloutPrompt]
    harmless: Sequence[RolloutPrompt]
    tuning: Sequence[RolloutPrompt]
    """Harmless ones, of which the bound is taken."""


@dataclass(slots=True, frozen=True)
class Sampling:
    num_samples: int
    max_tokens: int
    seed: int


def measure(prompts: Prompts, sampling: Sampling, *, head: str, rate: float, bound: float | None) -> dict[str, Any]:
    """What --out is to hold: figures of each way to guard, and of how well the head's values tell toxic text."""
    app = create_app(Settings.model_validate({"log_level": "warning"}))
    return asyncio.run(_measure(app, prompts, sampling, head, rate, bound))


async def _measure(
    app: FastAPI, prompts: Prompts, sampling: Sampling, head: str, rate: float, bound: float | None
) -> dict[str, Any]:
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=_WAIT_S) as client,
    ):
        run = _Run(app, client, sampling, head)
        still = arms(head, 0.0)[NO_GUARD]
        if bound is None:
            bound = bound_for(run.watched(await run.answer(prompts.tuning, still)), rate)
        figures: dict[str, Any] = {}
        watched: list[list[Watched]] = []
        for name, control in arms(head, bound).items():
            print(name, file=sys.stderr, flush=True)
            risky, harmless = [await run.answer(some, control) for some in (prompts.risky, prompts.harmless)]
            if name == NO_GUARD:
                watched = [run.watched(risky), run.watched(harmless)]
            figures[name] = await run.figures(prompts.risky, risky, harmless)
    return {
        "head": head, "bound": round(bound, 4), "rate": rate, "num_prompts": len(prompts.risky),
        "num_harmless": len(prompts.harmless), "num_tuning": len(prompts.tuning), "num_samples": sampling.num_samples,
        "max_tokens": sampling.max_tokens, "seed": sampling.seed, "arms": figures,
        "detection": detection(watched[0], watched[1], bound),
    }  # fmt: skip


class _Run:
    def __init__(self, app: FastAPI, client: httpx.AsyncClient, sampling: Sampling, head: str) -> None:
        self._client, self._sampling, self._head = client, sampling, head
        self._engine = app.state.engine

    async def answer(self, prompts: Sequence[RolloutPrompt], control: dict[str, Any]) -> list[dict[str, Any]]:
        """The choices of all prompts, those of each together."""
        sampling, found = self._sampling, []
        for first in range(0, len(prompts), _BATCH):
            body = {
                "model": self._engine.info.model_id,
                "prompt": [self._start(prompt) for prompt in prompts[first : first + _BATCH]],
                "n": sampling.num_samples, "max_tokens": sampling.max_tokens, "seed": sampling.seed, "logprobs": 0,
                "control": {**control, "trace": True},
            }  # fmt: skip
            found += (await self._post(body))["choices"]
        return found

    def watched(self, choices: Sequence[dict[str, Any]]) -> list[Watched]:
        """Of responses without a guardrail, those that have a token."""
        return [
            Watched(
                text=choice["text"],
                starts=tuple(choice["logprobs"]["text_offset"]),
                values=tuple(entry["value_after"][self._head] for entry in choice["control_trace"]),
                spans=tuple(profane_spans(choice["text"])),
            )
            for choice in choices
            if "control_trace" in choice
        ]

    async def figures(
        self, prompts: Sequence[RolloutPrompt], risky: Sequence[dict[str, Any]], harmless: Sequence[dict[str, Any]]
    ) -> dict[str, Any]:
        texts = [choice["text"].removesuffix(DEFAULT_REPLACEMENT) for choice in risky]
        toxic_PS = np.array([bool(profane_spans(text)) for text in texts], dtype=float).reshape(len(prompts), -1)
        reports = [choice["control"].get("guardrail", {}) for choice in risky]
        return {
            "toxic": mean_interval(toxic_PS),
            "ended": _mean([choice["finish_reason"] == "content_filter" for choice in risky]),
            "ended_harmless": _mean([choice["finish_reason"] == "content_filter" for choice in harmless]),
            "retries": _mean([report.get("retries", 0) for report in reports]),
            "taken_back": _mean([report.get("tokens_taken_back", 0) for report in reports]),
            "tokens": _mean([len(choice.get("control_trace", ())) for choice in risky]),
            "log_probability": await self._log_probability(prompts, texts),
        }

    async def _log_probability(self, prompts: Sequence[RolloutPrompt], texts: Sequence[str]) -> float:
        """Mean over all tokens of the texts behind their prompts, under the base model."""
        starts = [self._start(prompt) for prompt in prompts for _ in range(self._sampling.num_samples)]
        read = [(start, self._engine.encode(text, add_special_tokens=False))
                for start, text in zip(starts, texts, strict=True) if text]  # fmt: skip
        scores: list[float] = []
        for first in range(0, len(read), _BATCH):
            some = read[first : first + _BATCH]
            body = {
                "model": self._engine.info.model_id, "prompt": [[*start, *own] for start, own in some],
                "max_tokens": 0, "echo": True, "logprobs": 0,
            }  # fmt: skip
            choices = (await self._post(body))["choices"]
            for (start, _), choice in zip(some, choices, strict=True):
                scores += choice["logprobs"]["token_logprobs"][len(start) :]
        return _mean(scores)

    def _start(self, prompt: RolloutPrompt) -> list[int]:
        if prompt.format == "chat":
            return self._engine.encode_chat([{"role": "user", "content": prompt.text}])
        return self._engine.encode(prompt.text)

    async def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        response = await self._client.post("/v1/completions", json=body)
        if response.is_error:
            raise RuntimeError(response.text)
        return response.json()


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 4) if values else 0.0
