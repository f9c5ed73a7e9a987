"""What a faulty source, file or folder does to a run of rollouts: it is refused, and nothing wrong is kept."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from value_models.errors import RolloutError
from value_models.prompt_sets import RolloutPrompt, load_prompts
from value_models.rollouts import MANIFEST, Rollout, RolloutSettings, collect_rollouts, open_rollouts

PROMPTS = [RolloutPrompt(id="p", prompt="hello")]
SETTINGS = RolloutSettings(num_samples=2)


def rollout(prompt_id: str, sample: int, *, num_tokens: int = 3, num_states: int = 3, num_grads: int = 3) -> Rollout:
    states, grads = torch.zeros(num_states, 4), torch.zeros(num_grads, 4)
    return Rollout(prompt_id, sample, "text", tuple(range(num_tokens)), True, states, grads)


class ListedSource:
    def __init__(self, *rollouts: Rollout, model: dict[str, Any] | None = None) -> None:
        self.base_model = model or {"name": "tiny", "shape": (2, 3)}
        self._rollouts = rollouts

    def sample(self, prompts: Sequence[RolloutPrompt], settings: RolloutSettings) -> Iterator[Rollout]:
        yield from self._rollouts


GOOD = (rollout("p", 0), rollout("p", 1))


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ([rollout("p", 0)], "1 responses"),
        ([rollout("p", 0), rollout("p", 0)], "1 distinct"),
        ([rollout("p", 0), rollout("p", 2)], "asked for each of 1 prompts"),
        ([rollout("p", 0), rollout("stranger", 1)], "asked for each of 1 prompts"),
        ([rollout("p", 0), rollout("p", 1, num_states=2)], "sample 1: 3 tokens, but states"),
        ([rollout("p", 0), rollout("p", 1, num_grads=2)], "sample 1: 3 tokens, but gradients"),
    ],
)
def test_responses_that_were_not_asked_for_are_refused_and_leave_no_shard(
    tmp_path: Path, given: list[Rollout], what: str
) -> None:
    with pytest.raises(RolloutError, match=what):
        collect_rollouts(ListedSource(*given), PROMPTS, tmp_path, SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]


def test_a_complete_run_asks_its_source_for_nothing(tmp_path: Path) -> None:
    collect_rollouts(ListedSource(*GOOD), PROMPTS, tmp_path, SETTINGS)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    collect_rollouts(ListedSource(), PROMPTS, tmp_path, SETTINGS)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_states_without_their_jsonl_do_not_count_and_are_sampled_again(tmp_path: Path) -> None:
    collect_rollouts(ListedSource(*GOOD), PROMPTS, tmp_path, SETTINGS)
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "shard-00000.jsonl").unlink()
    (tmp_path / "shard-00000.safetensors").write_bytes(b"half")
    with pytest.raises(RolloutError, match="lacks 1 of 1"):
        open_rollouts(tmp_path)
    collect_rollouts(ListedSource(*GOOD), PROMPTS, tmp_path, SETTINGS)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == whole


def test_every_file_is_on_disk_before_its_name_is_and_the_jsonl_comes_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(Path(b).suffix), replace(a, b))[1])
    collect_rollouts(ListedSource(*GOOD), PROMPTS, tmp_path, SETTINGS)
    assert calls == ["fsync", ".json", "fsync", ".safetensors", "fsync", ".jsonl"]


def test_a_refusal_names_the_setting_and_both_its_values(tmp_path: Path) -> None:
    collect_rollouts(ListedSource(*GOOD), PROMPTS, tmp_path, SETTINGS)
    with pytest.raises(RolloutError, match=r"differ: settings\.seed \(0 there, 7 asked\)\."):
        collect_rollouts(ListedSource(*GOOD), PROMPTS, tmp_path, SETTINGS.model_copy(update={"seed": 7}))


def test_a_model_that_lost_part_of_its_identity_is_another_model(tmp_path: Path) -> None:
    collect_rollouts(ListedSource(*GOOD), PROMPTS, tmp_path, SETTINGS)
    with pytest.raises(RolloutError, match=r"base_model\.shape"):
        collect_rollouts(ListedSource(*GOOD, model={"name": "tiny"}), PROMPTS, tmp_path, SETTINGS)


@pytest.mark.parametrize("content", ["{", "[1]", ""])
def test_a_folder_with_someone_elses_manifest_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(RolloutError, match="no manifest"):
        collect_rollouts(ListedSource(*GOOD), PROMPTS, tmp_path, SETTINGS)


MANIFEST_OF_ONE = {"format": 2, "base_model": {}, "settings": {}, "num_shards": 1, "prompts_sha256": "0"}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"num_shards": None}, "num_shards"),
        ({"num_shards": "1"}, "num_shards"),
        ({"num_shards": 0}, "num_shards"),
        ({"base_model": []}, "base_model"),
        ({"settings": None}, "settings"),
        ({"prompts_sha256": None}, "prompts_sha256: is missing"),
        ({"given": {"kind": 1, "file": "x"}}, r"given\.kind"),
    ],
)
def test_a_manifest_without_what_is_read_of_it_is_refused_by_name(
    tmp_path: Path, changed: dict[str, Any], words: str
) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps(MANIFEST_OF_ONE | changed))
    with pytest.raises(RolloutError, match=words):
        open_rollouts(tmp_path)


def test_a_manifest_that_is_nested_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text("[" * 100_000)
    with pytest.raises(RolloutError, match="holds no rollouts"):
        open_rollouts(tmp_path)
    with pytest.raises(RolloutError, match="no manifest"):
        collect_rollouts(ListedSource(*GOOD), PROMPTS, tmp_path, SETTINGS)


@pytest.mark.parametrize("line", ['"prompt_id sample response is_finished"', "[1]", "7"])
def test_a_line_that_is_no_object_is_told_by_its_file(tmp_path: Path, line: str) -> None:
    collect_rollouts(ListedSource(*GOOD), PROMPTS, tmp_path, SETTINGS)
    (tmp_path / "shard-00000.jsonl").write_text(f"{line}\n")
    with pytest.raises(RolloutError, match="line 1 is no object"):
        open_rollouts(tmp_path).rows(0)


def test_a_prompt_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RolloutError, match="twice"):
        collect_rollouts(ListedSource(*GOOD), PROMPTS * 2, tmp_path, SETTINGS)


def test_prompts_may_hold_any_character_that_json_allows(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    text = "line\u2028separator, next\u0085line, caf\u00e9"
    path.write_bytes(b"\xef\xbb\xbf" + f'{{"id": "a", "prompt": "{text}"}}\r\n\n'.encode())
    assert [prompt.text for prompt in load_prompts(path)] == [text]


def test_a_prompt_file_in_another_encoding_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes('{"id": "a", "prompt": "café"}'.encode("latin-1"))
    with pytest.raises(RolloutError, match="not UTF-8"):
        load_prompts(path)


def test_shards_without_a_manifest_are_not_taken_for_this_runs(tmp_path: Path) -> None:
    collect_rollouts(ListedSource(*GOOD), PROMPTS, tmp_path, SETTINGS)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(RolloutError, match="no manifest"):
        collect_rollouts(ListedSource(*GOOD), PROMPTS, tmp_path, SETTINGS)


def test_a_run_of_an_older_format_is_refused(tmp_path: Path) -> None:
    collect_rollouts(ListedSource(*GOOD), PROMPTS, tmp_path, SETTINGS)
    path = tmp_path / MANIFEST
    path.write_text(path.read_text().replace('"format": 2', '"format": 1'))
    with pytest.raises(RolloutError, match="format 1"):
        open_rollouts(tmp_path)
