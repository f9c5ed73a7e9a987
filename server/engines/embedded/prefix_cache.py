"""Which pages hold a prompt's beginning already, by digests of its full pages. Enter at `PrefixCache`."""

from __future__ import annotations

from server.engines.embedded.model.pages import PAGE_TOKENS, PagePool, page_digest
from server.engines.embedded.sequence import Sequence


class PrefixCache:
    def __init__(self, pool: PagePool, *, is_on: bool) -> None:
        self._pool = pool
        self._is_on = is_on

    def known_pages(self, sequence: Sequence) -> list[int]:
        """Pages that nobody need compute; the last token is always computed, for its state."""
        if not self._is_on or sequence.is_background or sequence.request.reads_whole_prompt:
            return []
        return self._pool.find(_digests(sequence, (sequence.prompt_len - 1) // PAGE_TOKENS))

    def remember(self, sequence: Sequence) -> None:
        """Keep what it has computed of its prompt for later ones; nobody sends what runs in the background again."""
        if not self._is_on or sequence.is_background:
            return
        num_full = sequence.num_prompt_computed // PAGE_TOKENS
        for page, digest in zip(sequence.pages, _digests(sequence, num_full), strict=False):
            self._pool.remember(page, digest)


def _digests(sequence: Sequence, count: int) -> list[bytes]:
    """Of the prompt's first pages; made once a group."""
    digests, tokens = sequence.group.digests, sequence.group.token_ids
    for index in range(len(digests), count):
        before = digests[-1] if digests else sequence.request.cache_salt.encode()
        digests.append(page_digest(before, tokens[index * PAGE_TOKENS : (index + 1) * PAGE_TOKENS]))
    return digests[:count]
