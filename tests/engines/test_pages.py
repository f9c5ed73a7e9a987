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


def test_a_digest_depends_on_all_before_it_and_on_the_salt() -> None:
    first, other = page_digest(b"", [1, 2]), page_digest(b"salt", [1, 2])
    assert first != other
    assert page_digest(first, [3]) != page_digest(other, [3])


@given(st.lists(st.tuples(st.sampled_from(["take", "release", "forget", "share", "remember"]), st.integers(0, 9))))
def test_every_page_is_free_idle_or_held_and_never_given_twice(moves: list[tuple[str, int]]) -> None:
    pool, held = PagePool(6), []
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
        assert pool.num_held == len(set(held))
        for digest in range(10):
            assert all(page != NULL_PAGE for page in pool.find([bytes([digest])]))
