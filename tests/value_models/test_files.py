"""Heads, prompts, rollouts and imported files on disk."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import pickle
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import nn

from tests.conftest import card_of, plain_gradient, random_head, write_heads
from value_models import store
from value_models.errors import HeadFileError, ImportFileError, RolloutError
from value_models.importer import import_pth
from value_models.prompt_sets import RolloutPrompt, load_prompts, split_of
from value_models.rollouts import Rollout, RolloutSettings, collect_rollouts, open_rollouts
from value_models.store import CARD_FILE, HEAD_FILE, load_head, parse_card

IDENTITY = {"name": "tiny", "architecture": "X", "hidden_size": 32, "vocab_size": 9, "fingerprint": "ab"}
PROMPTS = [RolloutPrompt(id=f"p{i}", prompt=f"prompt {i}") for i in range(5)]
SETTINGS = RolloutSettings(num_samples=2, prompts_per_shard=2)


@pytest.mark.parametrize(
    ("gain", "earned"), [(0.02, 0.02 * 0.1**0.5 * 50), (None, None), (0.0, None), (-0.02, None), (float("nan"), None)]
)
def test_a_card_tells_what_an_ascent_adds_to_a_response_if_it_adds_anything(
    gain: float | None, earned: float | None
) -> None:
    assert card_of("good", random_head(1), ascent_gain=gain).earned == pytest.approx(earned)


class FakeSource:
    """Responses that depend on prompt and sample alone; `fail_at` dies when it is asked for that prompt."""

    def __init__(self, fail_at: str | None = None, model: dict[str, Any] = IDENTITY) -> None:
        self.base_model = model
        self._fail_at = fail_at

    def sample(self, prompts: Sequence[RolloutPrompt], settings: RolloutSettings) -> Iterator[Rollout]:
        for prompt in reversed(prompts):
            if prompt.id == self._fail_at:
                raise KeyboardInterrupt
            for sample in range(settings.num_samples):
                length = int(prompt.id[1:]) + sample + 1
                states = torch.full((length, 4), float(length))
                yield Rollout(
                    prompt.id, sample, f"{prompt.id}/{sample}", tuple(range(length)), True, states, -states
                )  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_killed_run_goes_on_and_ends_like_one_that_was_not(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        collect_rollouts(FakeSource(fail_at="p2"), PROMPTS, tmp_path / "a", SETTINGS)
    (tmp_path / "a" / "shard-00001.safetensors.part").write_bytes(b"half")
    with pytest.raises(RolloutError, match="lacks 2 of 3 shards"):
        open_rollouts(tmp_path / "a")
    collect_rollouts(FakeSource(fail_at="p0"), PROMPTS, tmp_path / "a", SETTINGS)
    collect_rollouts(FakeSource(), PROMPTS, tmp_path / "b", SETTINGS)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_complete_run_reads_back_in_order(tmp_path: Path) -> None:
    collect_rollouts(FakeSource(), PROMPTS, tmp_path, SETTINGS)
    run = open_rollouts(tmp_path)
    rows = [row for shard in range(run.num_shards) for row in run.rows(shard)]
    assert [row["prompt_id"] for row in rows] == [p.id for p in PROMPTS for _ in range(2)]
    for shard in range(run.num_shards):
        tensors = run.tensors(shard)
        for first, last in itertools.pairwise(tensors.offsets.tolist()):
            assert (tensors.by_name["states_ND"][first:last] == last - first).all()
            assert (tensors.by_name["logp_grads_ND"][first:last] == first - last).all()
            assert tensors.by_name["token_ids_N"][first:last].tolist() == list(range(last - first))


@pytest.mark.parametrize(
    ("prompts", "settings", "model", "what"),
    [
        (PROMPTS[:4], SETTINGS, IDENTITY, "prompts_sha256"),
        (PROMPTS, RolloutSettings(num_samples=3, prompts_per_shard=2), IDENTITY, "settings"),
        (PROMPTS, SETTINGS, {**IDENTITY, "fingerprint": "other"}, "base_model"),
    ],
)
def test_another_run_in_the_same_folder_is_refused_with_what_differs(
    tmp_path: Path, prompts: list[RolloutPrompt], settings: RolloutSettings, model: dict[str, Any], what: str
) -> None:
    collect_rollouts(FakeSource(), PROMPTS, tmp_path, SETTINGS)
    with pytest.raises(RolloutError, match=what):
        collect_rollouts(FakeSource(model=model), prompts, tmp_path, settings)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "line 2"),
        ('{"id": "a"}', "line 2: prompt"),
        ('{"id": "x", "prompt": "y"}', "twice"),
        ('{"id": "b", "prompt": ""}', "prompt"),
    ],
)
def test_a_bad_prompt_file_names_the_line(tmp_path: Path, line: str, what: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"id": "x", "prompt": "hi"}}\n{line}\n')
    with pytest.raises(RolloutError, match=what):
        load_prompts(path)


def test_a_prompt_file_without_prompts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("\n\n")
    with pytest.raises(RolloutError, match="holds none"):
        load_prompts(tmp_path / "prompts.jsonl")


def test_a_prompt_keeps_its_side_of_the_split() -> None:
    sides = [split_of(f"id-{i}") for i in range(2000)]
    assert sides == [split_of(f"id-{i}") for i in range(2000)]
    assert sides.count("test") == pytest.approx(200, abs=50)
    assert sides.count("validation") == pytest.approx(200, abs=50)


def test_the_shipped_prompts_are_many_diverse_and_unique() -> None:
    prompts = load_prompts(Path("value_models/prompts/prompts.jsonl"))
    assert len(prompts) > 1000
    assert len({prompt.text for prompt in prompts}) == len(prompts)
    assert len({prompt.kind for prompt in prompts}) >= 15


def test_a_saved_head_reads_back_and_an_interrupted_one_is_no_head(tmp_path: Path) -> None:
    head = random_head(3, widths=(8, 6))
    write_heads(tmp_path, {"h": head}, IDENTITY)
    again, card = load_head(tmp_path / "h")
    hidden = torch.randn(2, 32)
    assert torch.equal(again.value(hidden), head.value(hidden))
    assert card.architecture.hidden_widths == [8, 6]
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in (tmp_path / "h").iterdir())
    (tmp_path / "h" / CARD_FILE).unlink()
    with pytest.raises(HeadFileError, match=CARD_FILE):
        load_head(tmp_path / "h")


@pytest.mark.parametrize("content", [b"", b"not safetensors", pickle.dumps({"a": 1})])
def test_a_head_file_that_is_not_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    write_heads(tmp_path, {"h": random_head(3)}, IDENTITY)
    (tmp_path / "h" / HEAD_FILE).write_bytes(content)
    path = tmp_path / "h" / CARD_FILE
    digest = hashlib.sha256(content).hexdigest()
    path.write_text(json.dumps({**json.loads(path.read_text()), "tensors_sha256": digest}))
    with pytest.raises(HeadFileError, match="cannot be loaded"):
        load_head(tmp_path / "h")


def test_tensors_that_the_card_was_not_written_for_are_refused(tmp_path: Path) -> None:
    write_heads(tmp_path / "a", {"h": random_head(3)}, IDENTITY)
    write_heads(tmp_path / "b", {"h": random_head(4)}, IDENTITY)
    shutil.copy(tmp_path / "b" / "h" / HEAD_FILE, tmp_path / "a" / "h" / HEAD_FILE)
    with pytest.raises(HeadFileError, match="tensors_sha256"):
        load_head(tmp_path / "a" / "h")


def test_tensors_of_another_size_than_the_card_says_are_refused(tmp_path: Path) -> None:
    write_heads(tmp_path, {"h": random_head(3)}, {**IDENTITY, "hidden_size": 48})
    with pytest.raises(HeadFileError, match="states of size 32, but its card says 48"):
        load_head(tmp_path / "h")


@pytest.mark.parametrize(
    "change",
    [{"data": {"tokens": 10**400, "responses": {"train": 1}}}, {"data": {"tokens": 1, "responses": {"train": 10**400}}},
     {"validation": {"ascent_gain": 1e308}}, {"data": {"rollouts": "x"}}, {"data": {"rollouts": {"max_tokens": "x"}}}],
)  # fmt: skip
def test_figures_of_a_card_that_are_beyond_numbers_tell_nothing(change: dict[str, Any]) -> None:
    written = card_of("h", random_head(3), ascent_gain=0.02).model_dump(mode="json") | change
    card = parse_card(json.dumps(written).encode(), "a card")
    assert (card.earned, card.trained_tokens) == (None, None)


@pytest.mark.parametrize("field", ["reward_mean", "reward_scale"])
@pytest.mark.parametrize("number", ["NaN", "Infinity"])
def test_a_card_whose_list_could_not_be_told_as_json_is_refused(field: str, number: str) -> None:
    written = json.dumps(card_of("h", random_head(3)).model_dump(mode="json") | {field: 1234.5})
    with pytest.raises(HeadFileError, match=f"{field}: Input should be a finite number"):
        parse_card(written.replace("1234.5", number).encode(), "a card")


@pytest.mark.parametrize("file", [CARD_FILE, HEAD_FILE])
def test_what_is_no_file_is_refused_and_nobody_waits_for_it(tmp_path: Path, file: str) -> None:
    write_heads(tmp_path, {"h": random_head(3)}, IDENTITY)
    (tmp_path / "h" / file).unlink()
    os.mkfifo(tmp_path / "h" / file)
    with pytest.raises(HeadFileError, match=f"{file} is not a file"):
        load_head(tmp_path / "h")


@pytest.mark.parametrize(
    ("tensor", "number"),
    [("scale_D", 0.0), ("scale_D", 1e-40), ("mean_D", 1e38), ("inputs_UD", 1e30), ("ascent_UD", 1e30),
     ("input_bias_U", float("inf"))],
)  # fmt: skip
def test_a_head_beside_which_no_other_could_be_computed_is_refused(tmp_path: Path, tensor: str, number: float) -> None:
    """Finite numbers in a file may be none once the normalisation is folded in, or multiplied."""
    write_heads(tmp_path, {"h": random_head(3)}, IDENTITY)
    path, card = tmp_path / "h" / HEAD_FILE, tmp_path / "h" / CARD_FILE
    tensors = load_file(path)
    tensors[tensor].view(-1)[0] = number
    path.write_bytes(data := save(tensors))
    digest = hashlib.sha256(data).hexdigest()
    card.write_text(json.dumps({**json.loads(card.read_text()), "tensors_sha256": digest}))
    with pytest.raises(HeadFileError, match="not finite, or whose products are not"):
        load_head(tmp_path / "h")


def test_a_head_whose_replacement_was_cut_off_is_no_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_heads(tmp_path, {"h": random_head(3)}, IDENTITY)
    with monkeypatch.context() as patch:
        patch.setattr(store, "save_card", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_heads(tmp_path, {"h": random_head(4)}, IDENTITY)
    with pytest.raises(HeadFileError, match=CARD_FILE):
        load_head(tmp_path / "h")


def test_a_card_with_an_unknown_or_wrong_field_is_refused_by_name(tmp_path: Path) -> None:
    write_heads(tmp_path, {"h": random_head(3)}, IDENTITY)
    path = tmp_path / "h" / CARD_FILE
    card = json.loads(path.read_text())
    for change, what in (
        ({"surprise": 1}, "surprise"),
        ({"reward_mean": "x"}, "reward_mean"),
        ({"name": "../x"}, "name"),
    ):
        path.write_text(json.dumps({**card, **change}))
        with pytest.raises(HeadFileError, match=what):
            load_head(tmp_path / "h")


@pytest.mark.parametrize("widths", [[6, 5, 1], [6, 5, 4, 1]])
def test_the_papers_value_functions_are_imported_exactly(tmp_path: Path, widths: list[int]) -> None:
    layers: list[nn.Module] = []
    for size_in, size_out in itertools.pairwise(widths):
        layers += [nn.Linear(size_in, size_out), nn.ReLU()]
    network = nn.Sequential(*layers[:-1])
    torch.save({f"module.{name}": value for name, value in network.state_dict().items()}, tmp_path / "value.pth")
    x = torch.randn(3, 6, requires_grad=True)
    head = import_pth(tmp_path / "value.pth").head()
    expected_B = network(x)[:, 0]
    torch.testing.assert_close(head.value(x.detach()), expected_B)
    torch.testing.assert_close(plain_gradient(head, x.detach()), torch.autograd.grad(expected_B.sum(), x)[0])


def _layer(name: str, size_in: int, size_out: int) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": torch.zeros(size_out, size_in), f"{name}.bias": torch.zeros(size_out)}


class Evil:
    def __reduce__(self) -> Any:
        return (open, ("/tmp/recontrol-was-here", "w"))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (_layer("a", 3, 1), "2 or 3"),
        ({**_layer("a", 3, 4), **_layer("b", 5, 1)}, "chain"),
        ({"a.weight": torch.zeros(4, 3)}, "expected weights and biases"),
        ([1, 2], "no state dict"),
        (Evil(), "plain tensors"),
    ],
)  # fmt: skip
def test_what_is_no_value_function_is_refused_and_code_is_never_run(tmp_path: Path, content: Any, what: str) -> None:
    torch.save(content, tmp_path / "value.pth")
    with pytest.raises(ImportFileError, match=what):
        import_pth(tmp_path / "value.pth")
    assert not Path("/tmp/recontrol-was-here").exists()
