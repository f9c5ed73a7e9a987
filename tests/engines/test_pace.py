"""How many prompt tokens steps are given beside decoding rows, on machines that are simulated: no time is measured."""

import random
from collections.abc import Callable

import pytest

from server.engines.embedded.pace import Pace
from server.engines.embedded.shares import Budget, Piece, share_out

Machine = Callable[[int, list[Piece]], float]
"""Seconds that a step takes: decoding rows, and what is read beside them."""
STREAM = 1


def machine(
    *,
    base_s: float = 0.016,
    token_s: float,
    launch_s: float = 0.0,
    fetch_s: float = 0.0,
    told_s: float = 0.0,
    reach: float = 3000,
) -> Machine:
    """Each token costs the same, and more by how many it attends to, and `told_s` more if it is told; with prompts,
    `launch_s` comes on top, and `fetch_s` for each token that has been read before."""

    def seconds(num_rows: int, pieces: list[Piece]) -> float:
        read_s = sum(piece.num_tokens * token_s * (1 + piece.position / reach) for piece in pieces)
        once_s = sum(launch_s + piece.position * fetch_s for piece in pieces[:1])
        return base_s + num_rows * token_s + once_s + read_s + told_s * sum(p.num_tokens for p in pieces if p.is_told)

    return seconds


def read(
    pace: Pace, takes: Machine, num_tokens: int, *, start: int = 0, rows: int = STREAM, is_told: bool = False
) -> list[tuple[int, float]]:
    """Read a prompt of so many tokens beside decoding rows; each step's tokens and seconds."""
    steps: list[tuple[int, float]] = []
    position = start
    while position < start + num_tokens:
        unread = Piece(position, start + num_tokens - position, is_told)
        (count,) = share_out([unread], pace.budget(rows, 256))
        pieces = [unread._replace(num_tokens=count)] if count else []
        steps.append((count, takes(rows, pieces)))
        pace.observe(rows, pieces, steps[-1][1])
        position += count
    return steps


@pytest.mark.parametrize("token_s", [0.00005, 0.0005, 0.002, 0.008, 0.015])
def test_no_step_is_longer_than_three_usual_ones_on_fast_machines_and_slow_ones(token_s: float) -> None:
    takes = machine(token_s=token_s)
    steps = read(Pace(2.0), takes, 3000)
    assert max(seconds for _, seconds in steps) <= 3 * takes(STREAM, [])


@pytest.mark.parametrize("token_s", [0.0002, 0.0005, 0.002])
def test_prompts_get_two_fifths_of_the_time_at_least(token_s: float) -> None:
    takes, pace = machine(token_s=token_s), Pace(2.0)
    read(pace, takes, 1000)
    steps = read(pace, takes, 2000)
    total_s = sum(seconds for _, seconds in steps)
    assert total_s - len(steps) * takes(STREAM, []) >= 0.4 * total_s


def test_what_has_to_be_fetched_for_a_long_prompt_leaves_less_for_its_tokens() -> None:
    takes = machine(token_s=0.0005, fetch_s=0.015 / 8000)
    steps = read(Pace(2.0), takes, 8000)
    assert max(seconds for _, seconds in steps) <= 3 * takes(STREAM, [])
    assert len(steps) < 1600


def test_where_prompts_cost_a_launch_and_little_more_steps_soon_hold_as_much_as_they_may() -> None:
    steps = read(Pace(2.0), machine(base_s=0.002, token_s=0.00001, launch_s=0.02), 6000)
    assert steps[-2][0] == 256
    assert len(steps) < 60


def test_one_measurement_that_a_neighbour_spoils_changes_little() -> None:
    takes, pace = machine(token_s=0.001), Pace(2.0)
    usual = read(pace, takes, 1000)[-2][0]
    piece = Piece(1000, usual)
    pace.observe(STREAM, [piece], 40 * takes(STREAM, [piece]))
    assert pace.budget(STREAM, 256).tokens == 0  # A look at what is usual now.
    after = [count for count, _ in read(pace, takes, 200, start=1000)]
    assert usual / 2 <= after[2] <= usual


@pytest.mark.parametrize("factor", [0.2, 5.0])
def test_a_machine_that_changes_its_speed_gets_the_same_shares_after_some_steps(factor: float) -> None:
    takes, pace = machine(token_s=0.001), Pace(2.0)
    before = read(pace, takes, 1000)[-2][0]
    changed = [count for count, _ in read(pace, lambda rows, pieces: factor * takes(rows, pieces), 400, start=1000)]
    assert max(changed[-10:-1]) == pytest.approx(before, rel=0.3)


def test_noise_neither_stops_prompts_nor_lets_them_stop_others() -> None:
    rng, takes, pace = random.Random(1), machine(token_s=0.001), Pace(2.0)
    steps = read(pace, lambda rows, pieces: takes(rows, pieces) * rng.choice([0.9, 1.0, 1.0, 1.1, 1.3]), 3000)
    seconds = sorted(taken / takes(STREAM, []) for _, taken in steps)
    assert seconds[-1] <= 4
    assert seconds[int(0.95 * len(seconds))] <= 3
    assert sum(seconds) <= 2.5 * 3000 * 0.001 * 2 / takes(STREAM, [])


def test_a_prompt_deep_in_a_text_is_taken_to_cost_what_is_surely_enough() -> None:
    takes, pace = machine(token_s=0.001, reach=500), Pace(2.0)
    read(pace, takes, 60)
    deep = read(pace, takes, 500, start=7000)
    assert max(seconds for _, seconds in deep) <= 3 * takes(STREAM, [])
    assert len(deep) < 500


@pytest.mark.parametrize("told_s", [0.0005, 0.004, 0.015])
def test_tokens_that_are_told_have_a_price_of_their_own(told_s: float) -> None:
    takes, pace = machine(token_s=0.0001, told_s=told_s), Pace(2.0)
    for _ in range(2):
        plain = read(pace, takes, 1000)
        told = read(pace, takes, 300, is_told=True)
        assert max(seconds for _, seconds in plain + told) <= 3 * takes(STREAM, [])
        # What the one costs changes nothing for the other.
        assert plain[-2][0] >= 80


def test_a_step_that_reads_both_kinds_is_no_longer_either() -> None:
    takes, pace = machine(token_s=0.0001, told_s=0.004), Pace(2.0)
    unread = [Piece(0, 3000), Piece(0, 200, is_told=True), Piece(0, 3000), Piece(0, 300, is_told=True)]
    slowest_s = 0.0
    while any(piece.num_tokens for piece in unread):
        left = [piece for piece in unread if piece.num_tokens]
        taken = share_out(left, pace.budget(STREAM, 256))
        pieces = [piece._replace(num_tokens=count) for piece, count in zip(left, taken, strict=True) if count]
        seconds = takes(STREAM, pieces)
        slowest_s = max(slowest_s, seconds)
        pace.observe(STREAM, pieces, seconds)
        unread = [
            piece._replace(position=piece.position + count, num_tokens=piece.num_tokens - count)
            for piece, count in zip(left, taken, strict=True)
        ]
    assert slowest_s <= 3 * takes(STREAM, [])


def test_other_numbers_of_rows_are_measured_before_prompts_stretch_them() -> None:
    takes, pace = machine(token_s=0.001), Pace(2.0)
    for rows in (32, 1, 8, 32, 1):
        steps = read(pace, takes, 300, rows=rows)
        assert max(seconds for _, seconds in steps) <= 3 * takes(rows, [])


def test_with_nobody_to_wait_a_step_holds_as_much_as_it_may() -> None:
    assert read(Pace(2.0), machine(token_s=1.0), 600, rows=0)[0][0] == 256


def test_half_is_for_the_shortest_and_the_rest_for_the_oldest() -> None:
    assert share_out([Piece(0, 900), Piece(0, 800), Piece(0, 10)], Budget(64)) == [32, 22, 10]
    assert share_out([Piece(0, 900), Piece(0, 800), Piece(0, 700)], Budget(64)) == [32, 0, 32]
    assert share_out([Piece(0, 900), Piece(0, 20), Piece(0, 10)], Budget(64)) == [34, 20, 10]
    assert share_out([Piece(0, 900)], Budget(64)) == [64]
    assert share_out([Piece(0, 5), Piece(0, 6)], Budget(64)) == [5, 6]
    assert share_out([], Budget(64)) == []


def test_the_oldest_and_the_shortest_go_on_however_dear_tokens_are() -> None:
    assert share_out([Piece(0, 900), Piece(0, 800), Piece(0, 10)], Budget(64, 0.1, lambda _: 9.0)) == [1, 0, 1]
    assert share_out([Piece(0, 900)], Budget(64, 0.1, lambda _: 9.0)) == [2]
    assert share_out([Piece(0, 900), Piece(0, 10)], Budget(1)) == [1, 0]
