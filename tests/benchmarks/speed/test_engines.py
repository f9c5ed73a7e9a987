"""Each worker's engine gives exactly the tokens that were asked for, on a tiny model, past every end of a text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.speed.command import Speed
from benchmarks.speed.models import packaged_gguf, random_model
from benchmarks.speed.peers import ARMS, PEERS, objectives
from benchmarks.speed.process import PeerError
from benchmarks.speed.setup import Setup
from benchmarks.speed.workers.main import _engine_class
from server.errors import ConfigurationError
from server.types import FinishReason, GenerationRequest, SamplingParams
from tests.conftest import EOS, run
from tests.test_architecture import FILES, imports_of

PROMPTS = [[i, i + 1, i + 2, 9] for i in range(4)]


@pytest.fixture
def load(random_folder: Path) -> Iterator[Callable[[str], Any]]:
    options = {"model": str(random_folder), "folder": str(random_folder), "heads_dir": str(random_folder / "heads"),
               "device": "cpu", "dtype": "float32", "threads": 1, "max_batch_size": 4, "max_len": 256,
               "seed": 0}  # fmt: skip
    return lambda peer: _engine_class(str(PEERS[peer].engine))({**options, **PEERS[peer].options})


def test_ignoring_the_end_of_a_sequence_a_text_goes_on_to_its_limit(make_core: Callable[..., Any]) -> None:
    def ends(*, ignore_eos: bool) -> tuple[list[list[int]], set[FinishReason]]:
        requests = [
            GenerationRequest(f"r{i}", (i,), SamplingParams(max_tokens=200, seed=i, ignore_eos=ignore_eos))
            for i in range(8)
        ]
        results = run(make_core(), requests)
        return [r.token_ids for r in results.values()], {r.finish_reasons[0] for r in results.values()}

    stopped, reasons = ends(ignore_eos=False)
    assert FinishReason.STOP in reasons
    whole, reasons = ends(ignore_eos=True)
    assert reasons == {FinishReason.LENGTH}
    assert {len(tokens) for tokens in whole} == {200}
    assert any(EOS in tokens[:-1] for tokens in whole)
    assert sorted(t[: len(s)] for s, t in zip(sorted(stopped), sorted(whole), strict=True)) == sorted(stopped)


def test_our_engine_reports_every_edit_of_rows_with_different_heads(load: Callable[[str], Any]) -> None:
    engine = load("recontrol")
    plain = engine.generate(prompts=PROMPTS, new_tokens=100, seed=1, objectives=[])
    assert plain == {"num_tokens": 400}
    rows = objectives(ARMS["recontrol-3-heads"], ("random-1", "random-2", "random-3"))
    assert [list(row["weights"]) for row in rows] == [["random-1", "random-2", "random-3"], ["random-1"],
                                                      ["random-2"], ["random-3"]]  # fmt: skip
    steered = engine.generate(prompts=PROMPTS, new_tokens=20, seed=1, objectives=rows)
    assert steered["num_tokens"] == steered["edits"]["reported"] == 80
    assert steered["edits"]["moved_share"] == 1.0
    assert steered["edits"]["nonfinite"] == 0


@pytest.mark.parametrize("peer", ["transformers", "transformers-continuous"])
def test_transformers_gives_as_many_tokens(load: Callable[[str], Any], peer: str) -> None:
    engine = load(peer)
    for prompts in (PROMPTS, PROMPTS[:1]):
        answer = engine.generate(prompts=prompts, new_tokens=100, seed=1, objectives=[])
        assert answer == {"num_tokens": 100 * len(prompts)}
    assert engine.facts()["device"] == "cpu"
    if peer == "transformers-continuous":
        engine._context.__exit__(None, None, None)


def test_random_weights_are_made_once_and_from_the_seed(random_folder: Path, model_folder: Callable[..., Path]) -> None:
    shape = str(model_folder("llama"))
    before = (random_folder / "model.safetensors").stat().st_mtime_ns
    work = random_folder.parent.parent
    assert random_model(shape, work, dtype="float32", device="cpu", seed=1) == random_folder
    assert (random_folder / "model.safetensors").stat().st_mtime_ns == before
    other = random_model(shape, work, dtype="float32", device="cpu", seed=2)
    assert (other / "model.safetensors").read_bytes() != (random_folder / "model.safetensors").read_bytes()
    assert sorted(path.name for path in random_folder.parent.iterdir()) == sorted([random_folder.name, other.name])


def test_a_shape_that_does_not_exist_or_has_no_room_for_the_tokenizer_is_refused(
    tmp_path: Path, model_folder: Callable[..., Path]
) -> None:
    with pytest.raises(ConfigurationError, match="llama-3-8b"):
        random_model("llama-9", tmp_path, dtype="float32", device="cpu", seed=0)
    config = json.loads((model_folder("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model_folder("llama") / name).read_bytes())
    with pytest.raises(ConfigurationError, match="vocabulary of 100"):
        random_model(str(tmp_path), tmp_path, dtype="float32", device="cpu", seed=0)


def test_a_peers_worker_imports_nothing_of_this_project() -> None:
    ours = ("recontrol_engine.py", "vllm_control_engine.py")
    workers = [path for path in FILES if path.parent.name == "workers" and path.name not in ours]
    assert len(workers) > 5
    assert not any(imports_of(path) for path in workers)


def test_the_four_bit_file_is_the_packages_own_and_other_models_have_none(model_folder: Callable[..., Path]) -> None:
    assert packaged_gguf(setup_of()).suffix == ".gguf"
    with pytest.raises(PeerError, match="4-bit"):
        packaged_gguf(setup_of(model=str(model_folder("llama"))))


def setup_of(**flags: Any) -> Setup:
    return Speed(**flags)._setup()
