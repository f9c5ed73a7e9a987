"""The workload: seeded and exact, whatever order it is asked in."""

from __future__ import annotations

import itertools

import pytest

from benchmarks.speed.setup import Workload

WORKLOAD = Workload(corpus=range(1000), prompt_tokens=32, new_tokens=8, seed=5)


def test_prompts_are_windows_of_the_corpus_of_the_asked_length() -> None:
    prompts = WORKLOAD.prompts(50, "offline", 0)
    assert all(prompt == list(range(prompt[0], prompt[0] + 32)) for prompt in prompts)
    assert len({prompt[0] for prompt in prompts}) > 40


def test_a_corpus_shorter_than_a_prompt_is_repeated() -> None:
    (prompt,) = Workload([1, 2, 3], prompt_tokens=7, new_tokens=1, seed=0).prompts(1)
    assert len(prompt) == 7
    assert all(later == earlier % 3 + 1 for earlier, later in itertools.pairwise(prompt))


def test_draws_depend_on_seed_and_key_and_on_nothing_else() -> None:
    again = Workload(corpus=range(1000), prompt_tokens=32, new_tokens=8, seed=5)
    again.arrivals_s(10, 2.0, 1)
    assert again.prompts(4, "a", 1) == WORKLOAD.prompts(4, "a", 1)
    assert WORKLOAD.prompts(4, "a", 1) != WORKLOAD.prompts(4, "a", 2)
    other = Workload(corpus=range(1000), prompt_tokens=32, new_tokens=8, seed=6)
    assert other.prompts(4, "a", 1) != WORKLOAD.prompts(4, "a", 1)
    assert WORKLOAD.seed_of("x") == again.seed_of("x") != WORKLOAD.seed_of("y")


def test_arrivals_are_a_poisson_process_of_the_rate() -> None:
    moments = WORKLOAD.arrivals_s(4001, 5.0, 0)
    gaps = [later - earlier for earlier, later in itertools.pairwise(moments)]
    mean = sum(gaps) / len(gaps)
    assert moments[0] == 0.0
    assert min(gaps) > 0
    assert mean == pytest.approx(0.2, rel=0.1)
    # Exponential gaps deviate by as much as their mean.
    assert (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5 == pytest.approx(mean, rel=0.1)
