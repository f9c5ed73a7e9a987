"""Training from a stream: the head is the one that whole matrices give, and memory does not grow with the tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.value_models.test_training import PROMPTS, SyntheticSource
from value_models import network, token_blocks
from value_models.errors import RolloutError, TrainingDataError
from value_models.heads import ValueHead
from value_models.moments import Moments, MomentSums
from value_models.rollouts import RolloutSettings, collect_rollouts
from value_models.sources import FitSource
from value_models.token_blocks import HeldTokens
from value_models.training import TrainSettings, train_head
from value_models.training_data import TrainingData, load_training_data

TEXTS = {prompt.id: prompt.text for prompt in PROMPTS}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    collect_rollouts(SyntheticSource(), PROMPTS, tmp_path, RolloutSettings(num_samples=6, prompts_per_shard=7))
    return tmp_path


@pytest.fixture
def data(folder: Path) -> TrainingData:
    return load_training_data(folder, "brevity", TEXTS)


def held(data: TrainingData, split: str | None = None) -> HeldTokens:
    blocks = list(data.blocks(split))
    ends = torch.cat([block.lengths for block in blocks]).cumsum(0)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
    states, grads = ([getattr(block, name) for block in blocks] for name in ("states_ND", "logp_grads_ND"))
    return HeldTokens(torch.cat(states), torch.cat(grads), offsets)


def same(one: ValueHead, other: ValueHead, tolerance: float) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return all(torch.allclose(mine[name], theirs[name], rtol=tolerance, atol=tolerance) for name in mine)


def direct_direction(data: TrainingData, values_N: Tensor, damping: float) -> Tensor:
    """The natural direction [D] from whole matrices in float64."""
    source, tokens = FitSource.of(data, is_centred=True), held(data, "train")
    grads_ND = tokens.logp_grads_ND.double()
    reward_N = source.standard_B[data.is_in("train")].repeat_interleave(tokens.offsets.diff()).double()
    fisher_DD = grads_ND.T @ grads_ND
    damped_DD = fisher_DD + damping * fisher_DD.diagonal().mean() * torch.eye(len(fisher_DD), dtype=torch.float64)
    return torch.linalg.solve(damped_DD, (reward_N - values_N) @ grads_ND)


def test_a_head_of_a_stream_is_the_one_that_whole_matrices_give(data: TrainingData) -> None:
    head, tokens = train_head([data], TrainSettings()).head, held(data, "train")
    states_ND = tokens.states_ND.double()
    x_ND = (states_ND - states_ND.mean(0)) / states_ND.std(0, correction=0)
    source = FitSource.of(data, is_centred=True)
    target_N = source.standard_B[data.is_in("train")].repeat_interleave(tokens.offsets.diff()).double()
    regularised_DD = x_ND.T @ x_ND / len(x_ND) + 0.01 * torch.eye(x_ND.shape[1])
    linear_D = torch.linalg.solve(regularised_DD, x_ND.T @ target_N / len(x_ND))
    assert torch.allclose(head.inputs_UD[0].double(), linear_D, rtol=1e-5, atol=1e-6)
    direction_D = direct_direction(data, x_ND @ linear_D, damping=0.1)
    assert torch.cosine_similarity(head.folded_ascent()[0].double(), direction_D, dim=0) > 1 - 1e-9


@pytest.mark.parametrize("settings", [{}, {"metric": "covariance"}, {"hidden_widths": (8,), "max_epochs": 2}])
def test_the_size_of_blocks_and_the_files_make_no_difference(
    settings: dict[str, object], data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = TrainSettings.model_validate(settings)
    head = train_head([data], fitted).head
    in_memory = train_head([replace(data, tokens=held(data))], fitted).head
    monkeypatch.setattr(token_blocks, "BLOCK_NUMBERS", 300)
    assert len(list(data.blocks("train"))) > 20
    assert same(head, in_memory, 1e-5)
    assert same(head, train_head([data], fitted).head, 1e-5)


@pytest.mark.parametrize("targets", ["monte_carlo", "td_lambda", "td_one_step"])
def test_hidden_layers_learn_from_windows_that_hold_a_part_of_the_tokens(
    targets: str, data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "WINDOW_NUMBERS", 6000)
    settings = {"targets": targets, "hidden_widths": (16,), "batch_size": 128, "max_epochs": 8, "learning_rate": 3e-3}
    trained = train_head([data], TrainSettings.model_validate(settings))
    assert trained.figures[0].r2["all"] > 0.5
    assert same(trained.head, train_head([data], TrainSettings.model_validate(settings)).head, 0.0)


def test_each_token_is_in_one_window_of_an_epoch(data: TrainingData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "WINDOW_NUMBERS", 6000)
    monkeypatch.setattr(token_blocks, "BLOCK_NUMBERS", 600)
    sources = [FitSource.of(data, is_centred=True)]
    learner, moments = network.Network(None, 12, (4,)), made_moments(sources[0])
    epochs = [
        list(network._windows(learner, sources, moments, TrainSettings(hidden_widths=(4,)), epoch)) for epoch in (1, 2)
    ]
    first, second = (torch.cat([window.states_ND for window in windows]) for windows in epochs)
    assert max(len(window.target_N) for window in epochs[0]) <= 500
    assert len(epochs[0]) > 3
    assert not torch.equal(first, second)
    assert torch.equal(first.sort(0).values, second.sort(0).values)
    assert torch.equal(first.sort(0).values, held(data, "train").states_ND.sort(0).values)


def made_moments(source: FitSource) -> Moments:
    sums = MomentSums()
    for block in source.data.blocks("train"):
        sums.add(block.states_ND, block.of_tokens(source.standard_B))
    return sums.moments()


GROWTH = """
import json, sys
from benchmarks.training_memory import Case, fit, write_files
from benchmarks import training_memory
from value_models import network, token_blocks
training_memory.BLOCK_NUMBERS = token_blocks.BLOCK_NUMBERS = network.WINDOW_NUMBERS = 1 << 19
peaks = []
for num_tokens in (40_000, 200_000):
    folder = f"{sys.argv[1]}/{len(peaks)}" if sys.argv[2] == "files" else None
    case = Case(num_tokens, 128, (16,) if sys.argv[2] == "layers" else (), folder=folder)
    if folder is not None:
        write_files(case)
    peaks.append(fit(case))
print(json.dumps(peaks))
"""


@pytest.mark.parametrize("way", ["layers", "files"])
def test_peak_memory_does_not_grow_with_the_number_of_tokens(way: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", GROWTH, tmp_path, way], check=True, capture_output=True, text=True)
    few, many = json.loads(done.stdout)
    # The states and gradients of the longer run are 98 MiB, those of the other 20.
    assert many["peak_mib"] - few["peak_mib"] < 40
    assert many["cosine_with_goal"] > 0.9
    assert many["critics"] == ["prefix_reward", "value"]


def test_a_run_whose_files_do_not_belong_together_is_refused(folder: Path, data: TrainingData) -> None:
    path = folder / "shard-00001.safetensors"
    tensors = load_file(path)
    for name, what in (("offsets", "its offsets do not fit"), ("states_ND", "its offsets do not fit")):
        save_file({**tensors, name: tensors[name][:-1].clone()}, path)
        with pytest.raises(RolloutError, match=f"shard-00001.safetensors or .* is damaged .*{what}"):
            load_training_data(folder, "brevity", TEXTS)
    save_file(tensors, path)
    rows = folder / "shard-00001.jsonl"
    whole = rows.read_text()
    for damage, what in (("{torn", "line 2: Expecting"), ('{"prompt_id": "p7"}', "line 2 lacks sample")):
        lines = whole.split("\n")
        rows.write_text("\n".join([lines[0], damage, *lines[2:]]))
        with pytest.raises(RolloutError, match=what):
            load_training_data(folder, "brevity", TEXTS)
    rows.write_text(whole.partition("\n")[2])
    with pytest.raises(RolloutError, match="41 lines, but tensors of 42 responses"):
        load_training_data(folder, "brevity", TEXTS)
    rows.write_text(whole)
    path.write_bytes((folder / "shard-00002.safetensors").read_bytes())
    with pytest.raises(RolloutError, match="it is another than a minute ago"):
        train_head([data], TrainSettings())


@pytest.mark.parametrize("settings", [{}, {"hidden_widths": (4,), "max_epochs": 1}])
@pytest.mark.parametrize(("name", "split"), [("states", "train"), ("states", "validation"), ("grads", "train")])
def test_numbers_that_are_not_finite_are_refused(
    name: str, split: str, settings: dict[str, object], data: TrainingData
) -> None:
    tokens = held(data)
    first = int(data.offsets[data.is_in(split).nonzero()[0, 0]])
    numbers_ND = tokens.states_ND if name == "states" else tokens.logp_grads_ND
    numbers_ND[first, 3] = float("nan")
    with pytest.raises(TrainingDataError, match="not finite"):
        train_head([replace(data, tokens=tokens)], TrainSettings.model_validate(settings))
