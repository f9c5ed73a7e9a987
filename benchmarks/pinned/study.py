"""The study itself: a server in this process, every attempt on the same prompts and seeds. Enter at `measure`.

Shapes: P prompts.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from fastapi import FastAPI

from benchmarks.pinned.attempts import ATTEMPTS, NEARLY, OPPOSITE, PINNED_HEAD, Attempt
from server.app import create_app
from server.settings import DEFAULT_MODEL, Settings
from value_models.heads import LinearHead, ValueHead
from value_models.intervals import mean_interval
from value_models.prompt_sets import RolloutPrompt
from value_models.rewards import positive
from value_models.store import CARD_FILE, architecture_card, load_head, save_head, shipped_heads_folder

PINNED = f'{{"objective": {{"weights": {{"{PINNED_HEAD}": 1.0}}}}}}'
_NOISE = 0.3
_GOOD_BIAS, _BAD_BIAS = -100.0, 8.0
_MANAGED_S = 3600.0


def measure(prompts: Sequence[RolloutPrompt], *, max_tokens: int, seed: int) -> dict[str, Any]:
    """What --out is to hold: for each attempt the pinned head's mean value of the texts and VADER's score, and how both
    differ from those of pinning alone on the same prompts (of a prefill: from those without pinning)."""
    with tempfile.TemporaryDirectory() as folder:
        _make_heads(Path(folder))
        told = {"heads_dir": folder, "pinned_control": PINNED, "pinned_refuses": (), "log_level": "warning"}
        settings = Settings.model_validate(told)
        return asyncio.run(_measure(create_app(settings), prompts, max_tokens, seed))


def _make_heads(folder: Path) -> None:
    """The shipped heads, the pinned one turned round, and one that is nearly that."""
    shipped = shipped_heads_folder(DEFAULT_MODEL)
    for card in shipped.glob(f"*/{CARD_FILE}"):
        shutil.copytree(card.parent, folder / card.parent.name)
    head, card = load_head(shipped / PINNED_HEAD)
    for name, noise in ((OPPOSITE, 0.0), (NEARLY, _NOISE)):
        other = _turned(head, noise)
        made = card.model_copy(
            update={"name": name, "architecture": architecture_card(other), "reward_mean": -card.reward_mean}
        )
        save_head(folder / name, other, made)


def _turned(head: ValueHead, noise: float) -> LinearHead:
    assert isinstance(head, LinearHead)
    tensors = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    for name in ("inputs_UD", "ascent_UD"):
        random = torch.randn(tensors[name].shape, generator=generator)
        tensors[name] = -tensors[name] + noise * random * tensors[name].norm() / random.norm()
    tensors["input_bias_U"] = -tensors["input_bias_U"]
    reward_mean, reward_scale = tensors.pop("reward").tolist() if "reward" in tensors else (0.0, 1.0)
    return LinearHead(**tensors, reward_mean=-reward_mean, reward_scale=reward_scale)


async def _measure(app: FastAPI, prompts: Sequence[RolloutPrompt], max_tokens: int, seed: int) -> dict[str, Any]:
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://study", timeout=_MANAGED_S) as client,
    ):
        run = _Run(app, client, prompts, max_tokens, seed)
        alone, without = await run.score(Attempt("", {})), await run.score(Attempt("", {}), pinned=False)
        rows: list[dict[str, Any]] = []
        for attempt in ATTEMPTS:
            print(attempt.field, file=sys.stderr, flush=True)
            reference = await run.score(attempt, pinned=False) if attempt.prefill else alone
            rows.append(_row(attempt, await run.score(attempt), reference))
    return {
        "pinned": PINNED, "num_prompts": len(prompts), "max_tokens": max_tokens, "seed": seed,
        "alone": _means(alone), "without": _means(without), "attempts": rows,
    }  # fmt: skip


def _row(attempt: Attempt, scores: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> dict[str, Any]:
    change = mean_interval((scores["value"] - reference["value"])[:, None])
    reward = mean_interval((scores["reward"] - reference["reward"])[:, None])
    told = {
        "field": attempt.field,
        "kind": attempt.kind,
        "against": "the same without pinning" if attempt.prefill else "alone",
    }
    return {**told, **_means(scores), "change": change, "reward_change": reward}


def _means(scores: dict[str, np.ndarray]) -> dict[str, float]:
    return {name: round(float(values.mean()), 4) for name, values in scores.items()}


class _Run:
    def __init__(
        self, app: FastAPI, client: httpx.AsyncClient, prompts: Sequence[RolloutPrompt], max_tokens: int, seed: int
    ) -> None:
        self._app, self._client, self._max_tokens, self._seed = app, client, max_tokens, seed
        self._engine, self._pinned = app.state.engine, app.state.pinned
        self._texts = [prompt.text for prompt in prompts]

    async def score(self, attempt: Attempt, *, pinned: bool = True) -> dict[str, np.ndarray]:
        """`value` [P] of each text behind its prompt, in reward units, and `reward` [P] of the text."""
        engine = self._engine
        starts = [
            [*engine.encode_chat([{"role": "user", "content": text}]), *self._ids(attempt.prefill)]
            for text in self._texts
        ]
        body = {
            "model": engine.info.model_id, "prompt": starts, "seed": self._seed,
            "max_tokens": attempt.tokens or self._max_tokens, **attempt.body,
        }  # fmt: skip
        if body["model"].startswith("@"):
            body["model"] = engine.info.model_id + body["model"]
        if attempt.biased:
            bias = _GOOD_BIAS if "-100" in attempt.field else _BAD_BIAS
            body["logit_bias"] = {str(self._ids(f" {word}")[0]): bias for word in attempt.biased}
        self._app.state.pinned = self._pinned if pinned else None
        answer = await self._post("/v1/completions", body)
        self._app.state.pinned = self._pinned
        texts = [attempt.prefill + choice["text"] for choice in answer["choices"]]
        whole = [[*start, *self._ids(choice["text"])] for start, choice in zip(starts, answer["choices"], strict=True)]
        read = await self._post("/v1/value", {"model": engine.info.model_id, "heads": [PINNED_HEAD], "input": whole})
        values = [datum["values"][PINNED_HEAD] for datum in read["data"]]
        return {"value": np.array(values), "reward": np.array(positive(self._texts, texts))}

    def _ids(self, text: str) -> list[int]:
        return self._engine.encode(text, add_special_tokens=False) if text else []

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        response = await self._client.post(path, json=body)
        if response.is_error:
            raise RuntimeError(f"{path}: {response.text}")
        return response.json()
