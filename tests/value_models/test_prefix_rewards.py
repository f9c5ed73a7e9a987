"""Rewards of the text so far: right at every token, made once, and not asked for where they cannot be had."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.value_models.test_training import PROMPTS, SyntheticSource
from value_models import training_data
from value_models.errors import RolloutError
from value_models.prefix_rewards import MODEL_STRIDE, PrefixReport
from value_models.prompt_sets import RolloutPrompt
from value_models.rewards import is_read_by_a_model
from value_models.rollouts import Rollout, RolloutSettings, collect_rollouts
from value_models.sampled import StreamedText
from value_models.training import TrainSettings, train_head
from value_models.training_data import TrainingData, load_training_data

TEXTS = {prompt.id: prompt.text for prompt in PROMPTS}
SETTINGS = RolloutSettings(num_samples=4, prompts_per_shard=5)


class TellingSource(SyntheticSource):
    """Tells where each token begins: "word", " word", " word", and so on."""

    def sample(self, prompts: Sequence[RolloutPrompt], settings: RolloutSettings) -> Iterator[Rollout]:
        for rollout in super().sample(prompts, settings):
            ends = (0, *(5 * place - 1 for place in range(1, len(rollout.token_ids))))
            yield replace(rollout, text_ends=ends)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    collect_rollouts(TellingSource(), PROMPTS[:20], tmp_path / "run", SETTINGS)
    return tmp_path / "run"


def loaded(run: Path, reward: str = "brevity", *, stride: int | None = None) -> TrainingData:
    return load_training_data(run, reward, TEXTS, with_prefixes=True, prefix_stride=stride)


def rewards_of(data: TrainingData) -> list[Tensor]:
    """Of each response."""
    parts = [block.prefix_rewards_N.split(block.lengths.tolist()) for block in data.blocks(None)]
    return [one for part in parts for one in part]


def report_of(data: TrainingData) -> PrefixReport:
    assert isinstance(data.prefixes, PrefixReport)
    return data.prefixes


def counted(monkeypatch: pytest.MonkeyPatch, *, change: float = 0.0, stop_after: int | None = None) -> list[int]:
    """How many texts each call of a reward gets; it counts words, of which a change makes another reward."""
    calls: list[int] = []

    def reward(_prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(len(responses))
        return [change - len(response.split()) for response in responses]

    monkeypatch.setattr(training_data, "load_reward", lambda *_args, **_options: reward)
    return calls


@pytest.mark.parametrize("stride", [1, 3])
def test_each_token_has_the_reward_of_the_last_text_before_it_that_was_scored(run: Path, stride: int) -> None:
    data = loaded(run, stride=stride)
    assert report_of(data).stride == stride
    for rewards_T in rewards_of(data):
        words_T = torch.arange(len(rewards_T)) // stride * stride
        assert torch.equal(rewards_T[words_T > 0], -words_T[words_T > 0] / 50)
        assert rewards_T[words_T == 0].isnan().all()


def test_a_second_training_scores_nothing_and_sees_the_same(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    first = loaded(run)
    num_tokens, num_responses = int(first.offsets[-1]), len(first.reward_B)
    assert sum(calls) == num_responses + report_of(first).num_scored
    assert report_of(first).num_scored == num_tokens - num_responses
    calls.clear()
    again = loaded(run)
    assert sum(calls) == num_responses
    assert (report_of(again).num_scored, report_of(again).num_kept) == (0, num_tokens)
    for one, other in zip(rewards_of(first), rewards_of(again), strict=True):
        assert torch.equal(one.nan_to_num(9.0), other.nan_to_num(9.0))


def test_a_run_that_was_stopped_goes_on_where_it_stopped(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A shard takes two calls: of its responses, and of the text before their tokens.
    counted(monkeypatch, stop_after=5)
    with pytest.raises(KeyboardInterrupt):
        loaded(run)
    counted(monkeypatch)
    data = loaded(run)
    kept = sum(int(data.lengths_B[first : first + 20].sum()) for first in (0, 20))
    assert report_of(data).num_kept == kept
    assert not [rewards_T for rewards_T in rewards_of(data) if rewards_T[1:].isnan().any()]


@pytest.mark.parametrize("what", ["the reward", "a response", "the file"])
def test_what_has_changed_is_scored_anew(what: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted(monkeypatch)
    loaded(run)
    if what == "a response":
        rows = run / "shard-00002.jsonl"
        rows.write_text(rows.read_text().replace("word", "Word", 1))
    elif what == "the file":
        next(run.glob("prefix-rewards/*/00002.safetensors")).write_bytes(b"torn")
    counted(monkeypatch, change=1.0 if what == "the reward" else 0.0)
    data = loaded(run)
    in_shard = int(data.lengths_B[40:60].sum())
    assert report_of(data).num_kept == (0 if what == "the reward" else int(data.offsets[-1]) - in_shard)
    assert [rewards_T[1].item() for rewards_T in rewards_of(data)] == [0.0 if what == "the reward" else -1.0] * 80


def test_another_stride_is_kept_beside_the_first(run: Path) -> None:
    loaded(run)
    assert report_of(loaded(run, stride=2)).num_kept == 0
    assert report_of(loaded(run)).num_scored == 0


@pytest.mark.parametrize("name", ["relevance", "hf:some/model", "positive", "mine:kindness"])
def test_rewards_that_are_models_are_asked_at_every_eighth_token(name: str) -> None:
    assert is_read_by_a_model(name) == (name in ("relevance", "hf:some/model"))
    assert MODEL_STRIDE == 8


WHOLE_ONLY = """
def reward(prompts, responses):
    if not all(response.split()[-1] == "word" for response in responses) or any(len(r.split()) < 2 for r in responses):
        {fail}
    return [float(len(response)) for response in responses]
"""


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        ("raise KeyError('no end')", "cannot score the text so far .KeyError: 'no end'."),
        ("return [float('nan')] * len(responses)", "finite number .* it was asked about the text so far"),
    ],
)
def test_a_reward_that_needs_the_whole_text_leaves_the_heads_own_value(
    fail: str, message: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"whole_{fail.split(maxsplit=1)[0]}"
    (tmp_path / f"{name}.py").write_text(WHOLE_ONLY.format(fail=fail))
    monkeypatch.syspath_prepend(tmp_path)
    data = loaded(run, f"{name}:reward")
    trained = train_head([data], TrainSettings())
    assert trained.critic is not None
    assert trained.critic.why_not is not None
    assert trained.critic.name == "value"
    assert re.search(message, trained.critic.why_not)


def test_runs_of_earlier_versions_are_trained_on_without(tmp_path: Path) -> None:
    collect_rollouts(SyntheticSource(), PROMPTS[:20], tmp_path, SETTINGS)
    data = loaded(tmp_path)
    assert isinstance(data.prefixes, str)
    assert "does not tell where tokens begin in the text, since an earlier version made it" in data.prefixes
    assert not list(tmp_path.glob("prefix-rewards/*"))


@pytest.mark.parametrize("ends", [[0, 4], "0", [0, "4", 9], [3, 2, 1], [0, 4, 10**6]])
def test_ends_that_do_not_fit_the_text_are_refused(ends: object, run: Path) -> None:
    path = run / "shard-00001.jsonl"
    lines = path.read_text().splitlines()
    row = json.loads(lines[3])
    lines[3] = json.dumps({**row, "text_ends": ends})
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(RolloutError, match=f"text_ends of prompt '{row['prompt_id']}', sample 3, must be .* numbers"):
        loaded(run)


def test_a_folder_that_cannot_be_written_leaves_the_heads_own_value(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("read-only file system")

    monkeypatch.setattr("value_models.prefix_rewards.write_whole", refuse)
    assert loaded(run).prefixes == "rewards of the text so far cannot be kept below the run: read-only file system"


def test_the_critic_of_files_is_used_and_told(run: Path) -> None:
    trained = train_head([loaded(run)], TrainSettings(critic="prefix_reward"))
    assert trained.critic is not None
    assert trained.critic.explained is not None
    assert math.isfinite(trained.critic.explained)
    assert trained.critic.as_dict()["prefix_stride"] == 1


def test_a_tokens_text_begins_where_the_chunk_that_holds_it_began() -> None:
    streamed = StreamedText()
    for text, num_tokens in (("Hi", 1), ("", 1), (" there", 2), ("!", 1), ("", 1)):
        streamed.add(text, num_tokens)
    assert streamed.text == "Hi there!"
    assert streamed.text_ends == [0, 2, 2, 2, 8, 9]
