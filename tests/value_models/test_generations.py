"""Responses kept for evaluations: what is sampled, what is found again, and what survives a killed run."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from value_models.generations import EvalSample, GenerationStore
from value_models.prompt_sets import RolloutPrompt

PROMPTS = [RolloutPrompt(id=f"p{i}", prompt=f"prompt {i}") for i in range(4)]
SPEC = {"model": "m", "sampling": {"seed": 1}}


class CountingSampler:
    """Says which responses it was asked for; dies at `fail_at`."""

    def __init__(self, fail_at: str | None = None) -> None:
        self.asked: list[str] = []
        self._fail_at = fail_at

    def __call__(self, prompts: Sequence[RolloutPrompt], num_samples: int) -> Iterable[EvalSample]:
        for prompt in reversed(prompts):
            if prompt.id == self._fail_at:
                raise KeyboardInterrupt
            self.asked.append(prompt.id)
            for sample in range(num_samples):
                yield EvalSample(prompt.id, sample, f"{prompt.id}/{sample}", 3, 1.5, 0.1, 0.2, True, 0.25)


def responses(samples: list[EvalSample]) -> list[str]:
    return [sample.response for sample in samples]


def test_responses_come_by_prompt_and_number_and_are_sampled_once(tmp_path: Path) -> None:
    sampler, seen = CountingSampler(), []
    for _ in range(2):
        store = GenerationStore(tmp_path)
        samples = store.samples(SPEC, PROMPTS[:2], 2, sampler, on_sample=lambda: seen.append(1))
        assert responses(samples) == ["p0/0", "p0/1", "p1/0", "p1/1"]
    assert sampler.asked == ["p1", "p0"]
    assert len(seen) == 8


def test_runs_share_what_they_have_in_common(tmp_path: Path) -> None:
    sampler = CountingSampler()
    GenerationStore(tmp_path).samples(SPEC, PROMPTS[:2], 2, sampler)
    GenerationStore(tmp_path).samples(SPEC, PROMPTS[:3], 1, sampler)
    assert sampler.asked == ["p1", "p0", "p2"]
    GenerationStore(tmp_path).samples(SPEC, PROMPTS[:1], 3, sampler)
    assert sampler.asked[3:] == ["p0"]


@pytest.mark.parametrize("other", [{"model": "other"}, {"model": "m", "sampling": {"seed": 2}}])
def test_another_spec_shares_nothing(tmp_path: Path, other: dict[str, object]) -> None:
    sampler = CountingSampler()
    for spec in (SPEC, other):
        GenerationStore(tmp_path).samples(spec, PROMPTS[:1], 1, sampler)
    assert sampler.asked == ["p0", "p0"]


def test_a_prompt_whose_text_changed_is_sampled_anew(tmp_path: Path) -> None:
    sampler = CountingSampler()
    GenerationStore(tmp_path).samples(SPEC, PROMPTS[:1], 1, sampler)
    changed = PROMPTS[0].model_copy(update={"text": "other"})
    GenerationStore(tmp_path).samples(SPEC, [changed], 1, sampler)
    assert sampler.asked == ["p0", "p0"]


def test_a_killed_run_goes_on_where_it_stopped_even_in_the_middle_of_a_line(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        GenerationStore(tmp_path).samples(SPEC, PROMPTS, 2, CountingSampler(fail_at="p1"))
    (file,) = tmp_path.glob("*.jsonl")
    file.write_text(file.read_text()[:-20])
    sampler = CountingSampler()
    samples = GenerationStore(tmp_path).samples(SPEC, PROMPTS, 2, sampler)
    # p2's second response was torn.
    assert sampler.asked == ["p2", "p1", "p0"]
    assert responses(samples) == [f"p{i}/{j}" for i in range(4) for j in range(2)]
    assert len(file.read_text().splitlines()) == 9


def test_a_file_torn_in_its_first_line_is_begun_anew(tmp_path: Path) -> None:
    GenerationStore(tmp_path).samples(SPEC, PROMPTS[:1], 1, CountingSampler())
    (file,) = tmp_path.glob("*.jsonl")
    file.write_text('{"mod')
    sampler = CountingSampler()
    for _ in range(2):
        assert responses(GenerationStore(tmp_path).samples(SPEC, PROMPTS[:1], 1, sampler)) == ["p0/0"]
    assert sampler.asked == ["p0"]


def test_a_process_that_comes_second_waits_and_finds_what_the_first_sampled(tmp_path: Path) -> None:
    first, second = CountingSampler(), CountingSampler()

    def sampling_while_another_asks(prompts: Sequence[RolloutPrompt], num_samples: int) -> Iterable[EvalSample]:
        thread.start()
        yield from first(prompts, num_samples)

    thread = threading.Thread(target=lambda: GenerationStore(tmp_path).samples(SPEC, PROMPTS, 2, second))
    GenerationStore(tmp_path).samples(SPEC, PROMPTS, 2, sampling_while_another_asks)
    thread.join()
    assert first.asked == ["p3", "p2", "p1", "p0"]
    assert second.asked == []


def test_without_a_folder_responses_are_kept_in_memory() -> None:
    sampler, store = CountingSampler(), GenerationStore(None)
    assert store.samples(SPEC, PROMPTS, 1, sampler) == store.samples(SPEC, PROMPTS, 1, sampler)
    assert len(sampler.asked) == 4


def test_a_line_that_cannot_be_read_is_sampled_again(tmp_path: Path) -> None:
    GenerationStore(tmp_path).samples(SPEC, PROMPTS, 1, CountingSampler())
    (file,) = tmp_path.glob("*.jsonl")
    lines = file.read_text().split("\n")
    file.write_text("\n".join([*lines[:2], lines[2][:9] + lines[3], *lines[4:]]))
    sampler = CountingSampler()
    assert len(GenerationStore(tmp_path).samples(SPEC, PROMPTS, 1, sampler)) == 4
    assert len(sampler.asked) == 2
