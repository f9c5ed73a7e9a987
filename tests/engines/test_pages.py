"""The pool of pages against a model of it: who holds what, and what is remembered."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.engines.embedded.model.pages import NULL_PAGE, PAGE_TOKENS, PagePool, num_pages_for, page_digest


def test_pages_are_counted_by_their_tokens() -> None:
    assert [num_pages_for(n) for n in (0, 1, PAGE_TOKENS, PAGE_TOKENS + 1)] == [0, 1, 1, 2]


def test_taking_more_than_there_are_takes_none() -> None:
    pool = PagePool(4)
    assert pool.take(4) is None
    assert pool.take(3) == [1, 2, 3]
    assert pool.num_held == 3


def test_a_known_page_stays_until_its_place_is_needed_and_the_longest_unused_goes_first() -> None:
    pool = PagePool(4)
    pages = pool.take(3) or []
    digests = [page_digest(b"", [i]) for i in range(3)]
    for page, digest in zip(pages, digests, strict=True):
        pool.remember(page, digest)
    pool.release([pages[1]])
    pool.release([pages[0], pages[2]])
    assert [pool.find([digest]) for digest in digests] == [[page] for page in pages]
    assert pool.take(1) == [pages[1]]
    assert pool.find([digests[1]]) == []
    pool.share([pages[0]])
    assert pool.take(2) is None


def settle(pool: PagePool, num_prompts: int, pages_each: int) -> None:
    """Distinct prompts one after another, each remembered and let go."""
    for prompt in range(num_prompts):
        pages = pool.take(pages_each) or []
        for page in pages:
            pool.remember(page, page_digest(b"", [prompt, page]))
        pool.release(pages)


def test_beyond_the_high_water_mark_known_pages_make_room_before_fresh_ones_are_used() -> None:
    pool = PagePool(1001)
    pool.high_water = 100
    settle(pool, num_prompts=500_000 // (8 * PAGE_TOKENS), pages_each=8)
    # The prompt in progress may find too few that are idle, never more.
    assert pool.num_used == 100
    assert pool.num_available == 1000


def test_up_to_the_mark_nothing_is_forgotten() -> None:
    pool = PagePool(1001)
    pool.high_water = 100
    settle(pool, num_prompts=12, pages_each=8)
    assert all(pool.find([page_digest(b"", [prompt, 1 + 8 * prompt])]) for prompt in range(12))


def test_what_is_held_may_pass_the_mark_as_far_as_there_are_pages() -> None:
    pool = PagePool(11)
    pool.high_water = 0
    held = pool.take(10) or []
    assert held == list(range(1, 11))
    assert pool.take(1) is None
    pool.release(held)
    settle(pool, num_prompts=20, pages_each=3)
    assert pool.num_used == 10


def test_a_page_that_was_used_before_and_holds_nothing_comes_before_all_others() -> None:
    pool = PagePool(11)
    first, second = pool.take(2) or []
    pool.remember(second, page_digest(b"", [1]))
    pool.release([first, second])
    assert pool.take(2) == [first, 3]


def test_a_digest_depends_on_all_before_it_and_on_the_salt() -> None:
    first, other = page_digest(b"", [1, 2]), page_digest(b"salt", [1, 2])
    assert first != other
    assert page_digest(first, [3]) != page_digest(other, [3])


@given(st.lists(st.tuples(st.sampled_from(["take", "release", "forget", "share", "remember"]), st.integers(0, 9))))
def test_every_page_is_free_idle_or_held_and_never_given_twice(moves: list[tuple[str, int]]) -> None:
    pool, held = PagePool(6), []
    pool.high_water = 3
    for move, number in moves:
        if move == "take":
            taken = pool.take(number % 3) or []
            assert not set(taken) & set(held)
            assert NULL_PAGE not in taken
            held += taken
        elif held:
            page = held[number % len(held)]
            if move == "share":
                pool.share([page])
                held.append(page)
            elif move == "remember":
                pool.remember(page, bytes([number]))
            else:
                held.remove(page)
                forgotten = pool.release([page], forget=move == "forget")
                assert forgotten == ([page] if move == "forget" and page not in held else [])
        assert pool.num_held == len(set(held)) <= pool.num_used <= 5
        for digest in range(10):
            assert all(page != NULL_PAGE for page in pool.find([bytes([digest])]))
