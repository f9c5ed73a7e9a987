"""Which pages of the key-value cache are in use, and which hold a beginning that a later prompt may share.

A page holds PAGE_TOKENS positions of one sequence, or of several with the same beginning. Pages that nobody holds any
more but whose content is known stay until their place is needed, the longest unused going first. Memory follows the
pages that have ever been used: up to a high-water mark a fresh page is taken before a known one is forgotten, beyond it
only when there is none, so that a server's memory settles. What a page holds is known by a digest of its tokens, of all
before them and of the caller's salt: callers with different salts never share, so none can learn from response times
what another has sent. Control edits only what lies behind the cache, so controlled and uncontrolled requests share.
Knows nothing of tensors. Enter at `PagePool`.
"""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

PAGE_TOKENS = 64
NULL_PAGE = 0
"""Never given out and always zero: it pads tables."""


def num_pages_for(num_tokens: int) -> int:
    return -(-num_tokens // PAGE_TOKENS)


def page_digest(before: bytes, token_ids: Sequence[int]) -> bytes:
    """Of a page's tokens, given the digest of the page before (for the first, the caller's salt)."""
    return hashlib.blake2b(before + array("q", token_ids).tobytes(), digest_size=16).digest()


class PagePool:
    def __init__(self, num_pages: int) -> None:
        """`num_pages` counts the null page too."""
        self.num_pages = num_pages
        self.high_water = num_pages - 1
        """Pages that may have been used before known ones make room for others; by default all."""
        self.num_evicted = 0
        """Known pages whose place was needed."""
        self._next_fresh = NULL_PAGE + 1
        # Used before, and nothing known of them.
        self._free: list[int] = []
        self._holders = [0] * num_pages
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._digest_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}

    @property
    def num_available(self) -> int:
        """Pages that `take` can give out, those with remembered content included."""
        return len(self._free) + len(self._idle) + self.num_pages - self._next_fresh

    @property
    def num_held(self) -> int:
        return self.num_pages - 1 - self.num_available

    @property
    def num_used(self) -> int:
        """Pages that have ever been given out: those whose memory is taken, on a CPU."""
        return self._next_fresh - 1 - NULL_PAGE

    def take(self, count: int) -> list[int] | None:
        """So many pages, or none at all when there are fewer."""
        if count > self.num_available:
            return None
        taken = [self._take_one() for _ in range(count)]
        for page in taken:
            self._holders[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """One more holder for each of these pages, which must be held or idle."""
        for page in pages:
            self._idle.pop(page, None)
            self._holders[page] += 1

    def release(self, pages: Iterable[int], *, forget: bool = False) -> list[int]:
        """One holder less. `forget` drops what is known of pages that nobody else holds; returns those pages."""
        forgotten: list[int] = []
        for page in pages:
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if forget:
                self._forget(page)
                forgotten.append(page)
            if page in self._digest_of:
                self._idle[page] = None
            else:
                heapq.heappush(self._free, page)
        return forgotten

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """Pages of the longest known beginning; not yet held by the asker."""
        found: list[int] = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            found.append(page)
        return found

    def remember(self, page: int, digest: bytes) -> None:
        """A held page is full and computed; if its content is known already in another page, that one stays."""
        if page not in self._digest_of and digest not in self._page_of:
            self._digest_of[page], self._page_of[digest] = digest, page

    def _take_one(self) -> int:
        """Of those used before the lowest; fresh ones in their order."""
        if self._free:
            return heapq.heappop(self._free)
        has_fresh = self._next_fresh < self.num_pages
        if has_fresh and (self.num_used < self.high_water or not self._idle):
            self._next_fresh += 1
            return self._next_fresh - 1
        page, _ = self._idle.popitem(last=False)
        self._forget(page)
        self.num_evicted += 1
        return page

    def _forget(self, page: int) -> None:
        digest = self._digest_of.pop(page, None)
        if digest is not None:
            del self._page_of[digest]
