"""Which sequences a step holds, and which pages of the key-value cache each has.

Admission is first come, first served, as long as rows and pages last. A step takes one token of every decoding
sequence and prompt chunks up to a token budget, so long prompts stall running rows for one budget's time at most. When
pages run out, the sequence that was admitted last gives its own up and waits at the head of the queue: it keeps its
tokens, and later computes its prompt again and feeds those tokens through as decode rows, so nothing in it changes.
Candidates for a choice's next block (candidates.py) run behind it and lose their pages with it. Knows nothing of
models, sampling or control. Enter at `Scheduler.schedule`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from server.engines.embedded.model.kv_cache import KVCache, fork_pages
from server.engines.embedded.model.pages import PAGE_TOKENS, PagePool, num_pages_for, page_digest
from server.engines.embedded.model.step import DecodeRow, Segment
from server.engines.embedded.sequence import Sequence, SequenceState
from server.types import FinishReason

_MAX_REPLAYED_TOKENS = 64
"""Tokens that a resumed sequence feeds again in one step."""


@dataclass(slots=True)
class Step:
    """What one forward pass computes: rows of decoding sequences, then prompt chunks."""

    decoding: list[tuple[Sequence, list[DecodeRow]]] = field(default_factory=list)
    """A sequence's rows; more than one while it feeds again what it had before it lost its pages."""
    chunks: list[tuple[Sequence, Segment]] = field(default_factory=list)
    complete: list[Sequence] = field(default_factory=list)
    """Those whose prompt is computed after this step."""


class Scheduler:
    def __init__(self, kv: KVCache, *, max_batch_size: int, chunk_tokens: int, has_prefix_cache: bool = True) -> None:
        """`chunk_tokens` is the prompt tokens of a step, a page's worth at least."""
        assert chunk_tokens >= PAGE_TOKENS
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In order of admission; candidates behind the choice that leads them."""
        self.pool = PagePool(kv.num_pages)
        self._kv = kv
        self._max_batch_size = max_batch_size
        self._chunk_tokens = chunk_tokens
        self._has_prefix_cache = has_prefix_cache

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def num_rows(self) -> int:
        """Rows that are taken or set aside."""
        return sum(sequence.num_rows for sequence in self.running)

    def sequences(self) -> Iterator[Sequence]:
        """Everything that is not finished."""
        yield from list(self.running)
        yield from list(self.waiting)

    def schedule(self, now_s: float) -> Step:
        """Admit who can be, find pages for all, and say what to compute."""
        step = Step()
        for sequence in list(self.running):
            if sequence.state is SequenceState.DECODING and (rows := self._decode_rows(sequence)):
                step.decoding.append((sequence, rows))
        self._admit(now_s)
        self._take_chunks(step)
        # Who was preempted on the way has no pages any more.
        step.decoding = [pair for pair in step.decoding if pair[0].pages]
        step.chunks = [pair for pair in step.chunks if pair[0].pages]
        step.complete = [sequence for sequence in step.complete if sequence.pages]
        return step

    def start_decoding(self, sequence: Sequence) -> None:
        """The prompt is in the cache, in the sequence's own pages or in a sibling's, which it then forks."""
        if sequence.num_computed < sequence.prompt_len:
            donor = next(s for s in sequence.group.residents if s is not sequence and s.num_computed >= s.prompt_len)
            self.pool.release(sequence.pages)
            forked = fork_pages(self._kv, self.pool, donor.pages, sequence.prompt_len)
            assert forked is not None, "its own page has just become free"
            sequence.pages = forked
            sequence.num_computed = sequence.prompt_len
        sequence.state = SequenceState.DECODING

    def spread(self, leader: Sequence) -> bool:
        """Let a choice's candidates run, each in a copy of its pages; False when it had to give way instead."""
        length = leader.num_tokens
        copied = num_pages_for(length) - length // PAGE_TOKENS
        if not self._make_room(leader, copied * len(leader.candidates)):
            return False
        behind = self.running.index(leader) + 1
        self.running[behind:behind] = leader.candidates
        for candidate in leader.candidates:
            forked = fork_pages(self._kv, self.pool, leader.pages, length)
            assert forked is not None, "there is room"
            candidate.pages, candidate.num_computed = forked, length
            candidate.state = SequenceState.DECODING
        return True

    def gather(self, leader: Sequence, winner: Sequence) -> None:
        """End a choice's candidates; it goes on in the winner's pages."""
        leader.pages, winner.pages = winner.pages, leader.pages
        leader.num_computed = winner.num_computed
        self._drop_candidates(leader)

    def advance(self, step: Step) -> None:
        """The step is computed: count its positions, and remember full pages for later prompts."""
        for sequence, rows in step.decoding:
            sequence.num_computed += len(rows)
        for sequence, segment in step.chunks:
            sequence.num_computed = segment.end
            if self._has_prefix_cache and sequence.state is not SequenceState.FINISHED:
                self._remember(sequence)

    def remove(self, sequence: Sequence, reason: FinishReason) -> list[int]:
        """Finish a sequence wherever it is and free its pages; the pages that the next holder must find cleared."""
        forgotten: list[int] = []
        if sequence.state is SequenceState.WAITING:
            self.waiting.remove(sequence)
        else:
            # What did not end well may have left something non-finite.
            forgotten = self._evict(sequence, forget=reason not in {FinishReason.STOP, FinishReason.LENGTH})
        sequence.state, sequence.finish_reason = SequenceState.FINISHED, reason
        return forgotten

    def _admit(self, now_s: float) -> None:
        while self.waiting and (num_rows := self.num_rows + self.waiting[0].num_rows) <= self._max_batch_size:
            sequence = self.waiting[0]
            known = [] if sequence.group.residents else self._known_pages(sequence)
            self.pool.share(known)
            # A choice whose siblings run shares their pages but for one.
            missing = 1 if sequence.group.residents else num_pages_for(sequence.prompt_len) - len(known)
            # Each row may soon want a page more, and this one's first is among the missing.
            if self.running and missing + num_rows - 1 > self.pool.num_available:
                self.pool.release(known)
                return
            self.waiting.popleft()
            sequence.pages = known + (self.pool.take(missing) or [])
            sequence.num_computed = len(known) * PAGE_TOKENS
            sequence.num_cached = max(sequence.num_cached, sequence.num_computed)
            sequence.state = SequenceState.PREFILLING
            sequence.scheduled_s = sequence.scheduled_s or now_s
            sequence.group.residents.append(sequence)
            self.running.append(sequence)

    def _known_pages(self, sequence: Sequence) -> list[int]:
        """Pages that hold the prompt's beginning already; the last token is always computed, for its state."""
        if not self._has_prefix_cache or sequence.request.reads_whole_prompt:
            return []
        return self.pool.find(self._digests(sequence, (sequence.prompt_len - 1) // PAGE_TOKENS))

    def _remember(self, sequence: Sequence) -> None:
        num_full = min(sequence.num_computed, sequence.prompt_len) // PAGE_TOKENS
        for page, digest in zip(sequence.pages, self._digests(sequence, num_full), strict=False):
            self.pool.remember(page, digest)

    def _digests(self, sequence: Sequence, count: int) -> list[bytes]:
        """Of the prompt's first pages; made once a group."""
        digests, tokens = sequence.group.digests, sequence.group.token_ids
        for index in range(len(digests), count):
            before = digests[-1] if digests else sequence.request.cache_salt.encode()
            digests.append(page_digest(before, tokens[index * PAGE_TOKENS : (index + 1) * PAGE_TOKENS]))
        return digests[:count]

    def _take_chunks(self, step: Step) -> None:
        """Prompt chunks up to the budget, in order of admission, each ending at a page's end or with the prompt.

        A choice whose prompt a sibling has computed, or computes in this step, needs no chunk of its own.
        """
        budget = self._chunk_tokens
        computed: set[int] = set()
        for sequence in list(self.running):
            if sequence.state is not SequenceState.PREFILLING:
                continue
            if id(sequence.group) not in computed and not self._is_computed_by_sibling(sequence):
                segment = self._next_chunk(sequence, budget)
                if segment is None:
                    return
                step.chunks.append((sequence, segment))
                budget -= len(segment.token_ids)
                if segment.end < sequence.prompt_len:
                    return
                computed.add(id(sequence.group))
            step.complete.append(sequence)

    def _next_chunk(self, sequence: Sequence, budget: int) -> Segment | None:
        start, end = sequence.num_computed, sequence.prompt_len
        if end - start > budget:
            end = (start + budget) // PAGE_TOKENS * PAGE_TOKENS
        if end <= start or not self._find_pages(sequence, sequence.prompt_len):
            return None
        return Segment(sequence.pages, start, sequence.group.token_ids[start:end])

    def _decode_rows(self, sequence: Sequence) -> list[DecodeRow]:
        """The rows of the tokens that are not in the cache yet; none when there is no page for them."""
        first = sequence.num_computed
        end = min(sequence.num_tokens, first + _MAX_REPLAYED_TOKENS)
        if not self._find_pages(sequence, end):
            return []
        tokens = sequence.token_ids[first - sequence.prompt_len : end - sequence.prompt_len]
        return [DecodeRow(sequence.pages, position, token) for position, token in enumerate(tokens, start=first)]

    def _find_pages(self, sequence: Sequence, length: int) -> bool:
        """Give a running sequence room for `length` positions, preempting those admitted after it if it must be."""
        missing = num_pages_for(length) - len(sequence.pages)
        if not self._make_room(sequence, missing):
            return False
        if missing > 0:
            sequence.pages += self.pool.take(missing) or []
        return True

    def _make_room(self, sequence: Sequence, missing: int) -> bool:
        """Preempt who was admitted last until so many pages are there; False when that was the sequence itself."""
        while missing > self.pool.num_available:
            victim = self.running[-1].owner
            self._preempt(victim)
            if victim is sequence.owner:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._evict(sequence)
        if sequence.state is SequenceState.PREFILLING and sequence.num_computed:
            # They come again with the prompt.
            del sequence.group.prompt_logprobs[1:]
            sequence.group.token_values.clear()
        sequence.state, sequence.num_computed = SequenceState.WAITING, 0
        sequence.num_preemptions += 1
        self.waiting.appendleft(sequence)

    def _evict(self, sequence: Sequence, *, forget: bool = False) -> list[int]:
        forgotten = self._drop_candidates(sequence, forget=forget)
        self.running.remove(sequence)
        sequence.group.residents.remove(sequence)
        forgotten += self.pool.release(sequence.pages, forget=forget)
        sequence.pages = []
        return forgotten

    def _drop_candidates(self, leader: Sequence, *, forget: bool = False) -> list[int]:
        forgotten: list[int] = []
        for candidate in leader.candidates:
            if candidate.pages:
                self.running.remove(candidate)
                forgotten += self.pool.release(candidate.pages, forget=forget)
                candidate.pages, candidate.state = [], SequenceState.WAITING
        return forgotten

    def _is_computed_by_sibling(self, sequence: Sequence) -> bool:
        return any(s is not sequence and s.num_computed >= s.prompt_len for s in sequence.group.residents)
