"""`recontrol rollouts --engine vllm`: one engine samples and the embedded one reads. Here both are the embedded one,
so that the run must be the one that it samples by itself; vLLM's own tests are in tests/engines/vllm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from server.cli import main
from server.cli import rollouts as command
from server.engines.embedded.engine import EmbeddedEngine
from server.settings import Settings
from value_models.rollouts import open_rollouts

SAMPLING = ["--num-samples", "2", "--max-tokens", "6", "--prompts-per-shard", "3"]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings of each engine that stands in for vLLM."""
    settings: list[Settings] = []

    def create(given: Settings) -> EmbeddedEngine:
        settings.append(given)
        return EmbeddedEngine(given.model_copy(update={"engine": "embedded"}))

    monkeypatch.setattr(command, "create_engine", create)
    return settings


@pytest.fixture
def prompts(tmp_path: Path) -> list[str]:
    lines = [{"id": f"p{i}", "format": "text" if i % 2 else "chat", "prompt": f"prompt {i}"} for i in range(8)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ["--prompts", str(tmp_path / "p.jsonl")]


def test_the_run_is_the_one_that_one_engine_alone_gives(
    workshop: tuple[list[str], Path], prompts: list[str], started: list[Settings], tmp_path: Path
) -> None:
    words = ["rollouts", *workshop[0], *prompts, *SAMPLING, "--out"]
    assert main([*words, str(tmp_path / "alone")]) == 0
    assert main([*words, str(tmp_path / "two"), "--engine", "vllm", "--max-batch-size", "4"]) == 0
    assert [(one.engine, one.max_batch_size) for one in started] == [("vllm", 4)]
    alone, two = open_rollouts(tmp_path / "alone"), open_rollouts(tmp_path / "two")
    assert two.manifest == {**alone.manifest, "sampled_by": "vllm"}
    for shard in range(alone.num_shards):
        assert two.rows(shard) == alone.rows(shard)
        one, other = alone.tensors(shard), two.tensors(shard)
        assert torch.equal(one.offsets, other.offsets)
        for name, tensor in one.by_name.items():
            assert torch.allclose(tensor.float(), other.by_name[name].float(), atol=1e-4), name


def test_a_run_that_was_stopped_goes_on_in_either_half(
    workshop: tuple[list[str], Path], prompts: list[str], started: list[Settings], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ["rollouts", *workshop[0], *prompts, *SAMPLING, "--engine", "vllm", "--out", str(run)]
    assert main(words) == 0
    whole = {path.name: path.read_bytes() for path in run.iterdir()}
    (run / "shard-00001.jsonl").unlink()
    assert main(words) == 0
    assert len(started) == 1
    (run / "sampled-00002.jsonl").unlink()
    (run / "shard-00002.jsonl").unlink()
    assert main(words) == 0
    assert len(started) == 2
    assert {path.name: path.read_bytes() for path in run.iterdir()} == whole


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--vllm-options", '{"seed": 1}'], "vllm_options: goes with --engine vllm alone"),
        (["--tensor-parallel-size", "2"], "tensor_parallel_size: goes with --engine vllm alone"),
        (["--engine", "vllm", "--adapter", "lora"], "adapter: the engine vllm does not merge one in"),
        (["--engine", "fake"], "engine: Input should be 'embedded' or 'vllm'"),
        (["--engine", "vllm", "--max-model-len", "16", "--max-tokens", "20"], "prompt 'p0': This model's maximum"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(
    flags: list[str],
    why: str,
    workshop: tuple[list[str], Path],
    prompts: list[str],
    started: list[Settings],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["rollouts", *workshop[0], *prompts, "--out", str(tmp_path / "run"), *flags]) == 2
    assert f"recontrol rollouts: {why}" in capsys.readouterr().err
    assert not list(tmp_path.glob("run/s*"))


def test_another_engines_run_is_another_run(
    workshop: tuple[list[str], Path],
    prompts: list[str],
    started: list[Settings],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words: list[Any] = ["rollouts", *workshop[0], *prompts, *SAMPLING, "--out", str(tmp_path / "run")]
    assert main(words) == 0
    assert main([*words, "--engine", "vllm"]) == 2
    assert "these differ: sampled_by (None there, vllm asked)" in capsys.readouterr().err
    assert started == []


def test_damaged_samples_are_told_by_their_file(
    workshop: tuple[list[str], Path],
    prompts: list[str],
    started: list[Settings],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["rollouts", *workshop[0], *prompts, *SAMPLING, "--engine", "vllm", "--out", str(tmp_path / "run")]
    assert main(words) == 0
    (tmp_path / "run" / "sampled-00001.jsonl").write_text('{"prompt_id": "p3"}\n')
    (tmp_path / "run" / "shard-00001.jsonl").unlink()
    assert main(words) == 2
    assert "sampled-00001.jsonl is damaged" in capsys.readouterr().err
