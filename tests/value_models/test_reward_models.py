"""Reward models at scale: batches by length, and scores that outlive a run that is stopped."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from tests.conftest import byte_tokenizer
from tests.value_models.test_prefix_rewards import TellingSource
from tests.value_models.test_training import PROMPTS, SyntheticSource
from value_models import training_data
from value_models.errors import RewardError
from value_models.prefix_rewards import MODEL_STRIDE
from value_models.reward_models import BATCH_TOKENS, PADDING_SHARE, batches_by_length, model_identity
from value_models.rewards import Reward, load_reward
from value_models.rollouts import RolloutSettings, collect_rollouts
from value_models.training_data import load_training_data

TEXTS = {prompt.id: prompt.text for prompt in PROMPTS}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                         vocab_size=258, num_labels=1, pad_token_id=256)  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    collect_rollouts(
        SyntheticSource(), PROMPTS[:20], tmp_path / "run", RolloutSettings(num_samples=4, prompts_per_shard=5)
    )
    return tmp_path / "run"


@pytest.mark.parametrize("lengths", ["alike", "spread", "one long"])
def test_batches_hold_every_text_once_with_little_padding(lengths: str) -> None:
    rng = random.Random(0)
    drawn = {
        "alike": [100 + rng.randrange(8) for _ in range(1000)],
        "spread": [rng.randrange(1, 513) for _ in range(1000)],
        "one long": [512] + [10] * 500,
    }[lengths]
    batches = list(batches_by_length(drawn))
    assert sorted(index for batch in batches for index in batch) == list(range(len(drawn)))
    for batch in batches:
        longest, held = max(drawn[i] for i in batch), sum(drawn[i] for i in batch)
        assert longest * len(batch) <= max(BATCH_TOKENS, longest)
        assert longest * len(batch) - held <= max(PADDING_SHARE * longest * len(batch), 8 * len(batch))
    assert len(batches) < 60
    assert list(batches_by_length([])) == []


def test_scores_are_in_the_order_of_the_responses_whatever_their_lengths(model: Path) -> None:
    reward = load_reward(f"hf:{model}")
    responses = ["a" * n for n in (300, 1, 40, 2, 299, 7)]
    together = reward(["hi"] * 6, responses)
    assert together == pytest.approx([reward(["hi"], [response])[0] for response in responses], abs=1e-5)


def test_a_reward_model_may_be_read_in_another_dtype(model: Path) -> None:
    full, half = (load_reward(f"hf:{model}", dtype=dtype)(["hi"], ["there"])[0] for dtype in ("float32", "bfloat16"))
    assert full != half
    assert half == pytest.approx(full, abs=0.05)


def counted(monkeypatch: pytest.MonkeyPatch, *, stop_after: int | None = None) -> list[int]:
    """How many responses each call of a reward gets; the one after so many calls is interrupted."""
    calls: list[int] = []

    def load(name: str, **options: str) -> Reward:
        reward = load_reward(name, **options)

        def score(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
            if len(calls) == stop_after:
                raise KeyboardInterrupt
            calls.append(len(responses))
            return reward(prompts, responses)

        return score

    monkeypatch.setattr(training_data, "load_reward", load)
    return calls


def test_scores_of_a_reward_model_are_kept_and_go_on_where_they_stopped(
    model: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"hf:{model}"
    counted(monkeypatch, stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        load_training_data(run, name, TEXTS)
    calls = counted(monkeypatch)
    whole = load_training_data(run, name, TEXTS).reward_B
    assert calls == [20, 20]
    assert torch.equal(load_training_data(run, name, TEXTS).reward_B, whole)
    assert calls == [20, 20]
    (kept,) = (run / "scores").iterdir()
    assert sorted(path.name for path in kept.iterdir()) == [f"0000{i}.json" for i in range(4)]


def test_scores_of_another_model_dtype_or_text_or_that_are_damaged_are_not_taken(
    model: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted(monkeypatch)
    load_training_data(run, f"hf:{model}", TEXTS)
    load_training_data(run, f"hf:{model}", TEXTS, dtype="bfloat16")
    load_training_data(run, f"hf:{model}", {**TEXTS, "p0": "another prompt"})
    assert calls == [20] * 9
    for index, damage in enumerate(["{", "[]", json.dumps({"scores": [1.0]})]):
        for folder in (run / "scores").iterdir():
            (folder / f"0000{index}.json").write_text(damage)
    load_training_data(run, f"hf:{model}", TEXTS)
    assert calls == [20] * 12
    before = model_identity(f"{model}#0")
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    assert model_identity(f"{model}#0") != before


def test_a_reward_model_reads_the_text_so_far_at_every_eighth_token_and_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, name = tmp_path / "telling", f"hf:{model}"
    collect_rollouts(TellingSource(), PROMPTS[:10], run, RolloutSettings(num_samples=4, prompts_per_shard=5))
    calls = counted(monkeypatch)
    data = load_training_data(run, name, TEXTS, with_prefixes=True)
    num_long = int((data.lengths_B > MODEL_STRIDE).sum())
    assert sum(calls) == 40 + num_long
    read = load_reward(name)
    for block in data.blocks(None):
        position_N, rewards_N = block.position_of_tokens(), block.prefix_rewards_N
        assert rewards_N[position_N < MODEL_STRIDE].isnan().all()
        late_N = position_N >= MODEL_STRIDE
        prompts = [TEXTS[f"p{prompt}"] for prompt in block.of_tokens(data.prompt_B)[late_N].tolist()]
        wanted = read(prompts, [" ".join(["word"] * MODEL_STRIDE)] * len(prompts))
        assert rewards_N[late_N].tolist() == pytest.approx(wanted, abs=1e-5)
    calls.clear()
    load_training_data(run, name, TEXTS, with_prefixes=True)
    assert not calls


def test_other_rewards_leave_nothing_in_the_run(run: Path) -> None:
    load_training_data(run, "brevity", TEXTS)
    assert not (run / "scores").exists()


def test_a_score_that_is_no_number_names_the_shard(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "late_nan.py").write_text(
        "def reward(p, r):\n    return [float('nan') if 'word ' * 9 in x else 0.0 for x in r]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RewardError, match=r"one finite number for each of 20 responses: .* \(in shard \d of"):
        load_training_data(run, "late_nan:reward", TEXTS)
