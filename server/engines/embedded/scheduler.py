"""Which sequences a step holds, and which pages of the key-value cache each has.

A step takes one token of every decoding sequence, and beside them reads prompts: as much as pace.py allows, so that
running rows hardly stall, shared out by shares.py, so that short prompts do not wait for long ones. Admission is first
come, first served, as long as rows and pages last, but a prompt comes in only when a step has room to read it, and
short ones may then pass those before them. When pages run out, the sequence that was admitted last gives its own up and
waits at the head of the queue: it keeps its tokens, and later computes its prompt again and feeds those tokens through
as decode rows, so nothing in it changes. Candidates for a choice's next block (candidates.py) run behind it and lose
their pages with it, as does the shadow of a choice that follows an instruction (guidance.py), which is scheduled as any
other once the choice is in. Sequences in the background (background.py) are scheduled last, and give way first. Knows
nothing of models, sampling or control. Enter at `Scheduler.schedule`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from server.engines.embedded.background import in_background, of_requests, shared_budget
from server.engines.embedded.model.kv_cache import KVCache, fork_pages
from server.engines.embedded.model.layout import DecodeRow, PromptChunk
from server.engines.embedded.model.pages import PAGE_TOKENS, PagePool, num_pages_for
from server.engines.embedded.pace import Pace
from server.engines.embedded.prefix_cache import PrefixCache
from server.engines.embedded.sequence import Sequence, SequenceState
from server.engines.embedded.shares import Budget, Piece, share_out
from server.types import FinishReason

_MAX_REPLAYED_TOKENS = 64
"""Tokens that a resumed sequence feeds again in one step at most."""


@dataclass(slots=True)
class Step:
    """What one forward pass computes: rows of decoding sequences, then prompt chunks."""

    decoding: list[tuple[Sequence, list[DecodeRow]]] = field(default_factory=list)
    """A sequence's rows; several while it feeds again what it had before it lost its pages, for which it comes last."""
    chunks: list[tuple[Sequence, PromptChunk]] = field(default_factory=list)
    complete: list[Sequence] = field(default_factory=list)
    """Those whose prompt is computed after this step."""
    void: set[Sequence] = field(default_factory=set)
    """Of the decoding ones, those that have turned back since: what is computed for them is of no text."""
    num_usual: int = 0
    """Of the decoding sequences, those that feed one token as at every step."""
    pieces: list[Piece] = field(default_factory=list)
    """What all others feed and read, for pace.py."""


class Scheduler:
    def __init__(
        self,
        kv: KVCache,
        *,
        max_batch_size: int,
        chunk_tokens: int,
        has_prefix_cache: bool = True,
        pace: Pace | None = None,
    ) -> None:
        """`chunk_tokens` is the prompt tokens of a step at most, a page's worth at least; `pace` may allow fewer."""
        assert chunk_tokens >= PAGE_TOKENS
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In order of admission; candidates and a shadow behind their choice."""
        self.background: deque[Sequence] = deque()
        """Those that wait in the background."""
        self.pool = PagePool(kv.num_pages)
        self.num_preemptions = self.num_cache_queries = self.num_cache_hits = 0
        self._kv = kv
        self._max_batch_size = max_batch_size
        self._chunk_tokens = chunk_tokens
        self._prefixes = PrefixCache(self.pool, is_on=has_prefix_cache)
        self._pace = pace

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self.background)

    @property
    def num_rows(self) -> int:
        """Rows that requests have taken or set aside."""
        return sum(sequence.num_rows for sequence in of_requests(self.running))

    def sequences(self) -> Iterator[Sequence]:
        """Everything that is not finished."""
        yield from list(self.running)
        yield from list(self.waiting)
        yield from list(self.background)

    def add(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            self._queue_of(sequence).append(sequence)

    def schedule(self, now_s: float) -> Step:
        """Admit who can be, find pages for all, and say what to compute."""
        step = Step()
        for sequence in of_requests(self.running):
            is_usual = sequence.state is SequenceState.DECODING and sequence.num_unread == 1
            if is_usual and (rows := self._decode_rows(sequence, 1)):
                step.decoding.append((sequence, rows))
        self._admit(now_s)
        num_usual = len(step.decoding)
        budget = self._budget(num_usual)
        self._read(step, budget, of_requests(self.running))
        self._use_what_is_left(step, budget, now_s)
        # Who was preempted on the way decodes no more, even where it has come in anew, and has no pages otherwise.
        step.num_usual = sum(_decodes(sequence) for sequence, _ in step.decoding[:num_usual])
        step.decoding = [pair for pair in step.decoding if _decodes(pair[0])]
        step.chunks = [pair for pair in step.chunks if pair[0].pages]
        step.complete = [sequence for sequence in step.complete if sequence.pages]
        step.pieces = [Piece(rows[0].position, len(rows)) for _, rows in step.decoding[step.num_usual :]]
        step.pieces += [Piece(read.start, len(read.token_ids), sequence.tells_prompt) for sequence, read in step.chunks]
        return step

    def took(self, step: Step, seconds: float) -> None:
        """Learn how long a step has taken, all told."""
        if self._pace is not None:
            self._pace.observe(step.num_usual, step.pieces, seconds)

    def start_decoding(self, sequence: Sequence) -> bool:
        """The prompt is in the cache, in the sequence's own pages or in a sibling's, which it then forks.

        False when that sibling has ended since the step was scheduled: then it reads the prompt itself.
        """
        if sequence.num_computed < sequence.prompt_len:
            donor = next((one for one in _siblings(sequence) if one.num_computed >= one.prompt_len), None)
            if donor is None:
                return False
            self.pool.release(sequence.pages)
            forked = fork_pages(self._kv, self.pool, donor.pages, sequence.prompt_len)
            assert forked is not None, "its own page has just become free"
            sequence.pages = forked
            sequence.num_computed = sequence.prompt_len
        sequence.state = SequenceState.DECODING
        return True

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

    def truncate(self, sequence: Sequence) -> None:
        """Give back the pages behind the positions that a sequence has left, after it took tokens back.

        One that has lost its pages meanwhile holds those of its prompt alone, if any.
        """
        if not _decodes(sequence):
            return
        kept = num_pages_for(sequence.num_computed)
        self.pool.release(sequence.pages[kept:])
        del sequence.pages[kept:]

    def advance(self, step: Step) -> None:
        """The step is computed: count its positions, and remember full pages for later prompts."""
        for sequence, rows in step.decoding:
            if _decodes(sequence) and sequence not in step.void:
                sequence.num_computed += len(rows)
        for sequence, chunk in step.chunks:
            sequence.num_computed = chunk.end
            if sequence.state is not SequenceState.FINISHED:
                self._prefixes.remember(sequence)

    def remove(self, sequence: Sequence, reason: FinishReason) -> list[int]:
        """Finish a sequence wherever it is and free its pages; the pages that the next holder must find cleared."""
        forgotten: list[int] = []
        if sequence.state is SequenceState.WAITING:
            self._queue_of(sequence).remove(sequence)
        else:
            # What did not end well may have left something non-finite.
            forgotten = self._evict(sequence, forget=reason not in {FinishReason.STOP, FinishReason.LENGTH})
        sequence.state = SequenceState.FINISHED
        return forgotten

    def _admit(self, now_s: float) -> None:
        """Let the oldest prompts in until they fill a step, then shorter ones that it reads all the same.

        Where the oldest lacks rows or pages, so many may pass it as there are rows, and then nobody until it is in.
        """
        while self.waiting:
            oldest = self.waiting[0]
            before = sum(r.num_unread for r in self._request_readers() if r.arrival_s <= oldest.arrival_s)
            if before >= self._chunk_tokens and not oldest.group.residents:
                self._admit_shorter(now_s, stuck=None)
                return
            if not self._enter(oldest, now_s):
                self._admit_shorter(now_s, stuck=oldest)
                return

    def _admit_shorter(self, now_s: float, *, stuck: Sequence | None) -> None:
        """Those that would be read in this step by the half of it that is for the shortest."""
        if self.num_rows >= self._max_batch_size:
            return
        for sequence in sorted(self.waiting, key=lambda sequence: sequence.prompt_len):
            if stuck is not None and stuck.num_passed >= self._max_batch_size:
                return
            before = sum(r.num_unread for r in self._request_readers() if r.num_unread <= sequence.prompt_len)
            if before >= self._chunk_tokens // 2 and not sequence.group.residents:
                return
            if sequence is stuck:
                continue
            if not self._enter(sequence, now_s):
                return
            if stuck is not None:
                stuck.num_passed += 1

    def _enter(self, sequence: Sequence, now_s: float) -> bool:
        """Move a sequence from waiting to running, if there are rows and pages."""
        num_rows = self.num_rows + sequence.num_rows
        if num_rows > self._max_batch_size:
            return False
        entering = [(one, [] if one.group.residents else self._prefixes.known_pages(one)) for one in sequence.both]
        for _, known in entering:
            self.pool.share(known)
        # Each row may soon want a page more, and those that come in have their first among the missing.
        wanted = sum(_num_missing(one, known) for one, known in entering) + num_rows - len(entering)
        self._clear_background(num_rows, wanted)
        if self.running and wanted > self.pool.num_available:
            for _, known in entering:
                self.pool.release(known)
            return False
        self.waiting.remove(sequence)
        for one, known in entering:
            self._begin(one, known, now_s)
        return True

    def _begin(self, sequence: Sequence, known: list[int], now_s: float) -> None:
        """Let it run with the known pages and those that it lacks, which are there."""
        missing = _num_missing(sequence, known)
        if not sequence.group.residents:
            self.num_cache_queries += sequence.prompt_len
            self.num_cache_hits += len(known) * PAGE_TOKENS
        self._start(sequence, known + (self.pool.take(missing) or []), len(known) * PAGE_TOKENS, now_s)

    def _start(self, sequence: Sequence, pages: list[int], num_computed: int, now_s: float) -> None:
        sequence.pages, sequence.num_computed = pages, num_computed
        sequence.state, sequence.num_passed = SequenceState.PREFILLING, 0
        sequence.scheduled_s = sequence.scheduled_s or now_s
        sequence.group.residents.append(sequence)
        self.running.append(sequence)

    def _use_what_is_left(self, step: Step, budget: Budget, now_s: float) -> None:
        """Give the background what requests leave: beside them a few tokens of a step, and all of one without them."""
        has_requests = bool(self.waiting or of_requests(self.running))
        budget = shared_budget(budget) if has_requests else Budget(self._chunk_tokens)
        self._admit_background(now_s, most=budget.tokens if has_requests else self._max_batch_size)
        for sequence in in_background(self.running):
            is_usual = sequence.state is SequenceState.DECODING and sequence.num_unread == 1
            # Who is not given a token this time keeps its pages and is looked at again in the next step.
            is_next = is_usual and (not has_requests or budget.take(Piece(sequence.num_computed, 1)) > 0)
            if is_next and (rows := self._decode_rows(sequence, 1)):
                step.decoding.append((sequence, rows))
        self._read(step, budget, in_background(self.running))

    def _admit_background(self, now_s: float, *, most: int) -> None:
        """Let those in that fit beside everything that runs, until `most` of them do."""
        num_inside = len(in_background(self.running))
        num_rows = self.num_rows + num_inside
        while self.background and not self.waiting and num_inside < most and num_rows < self._max_batch_size:
            sequence = self.background[0]
            missing = num_pages_for(sequence.prompt_len)
            # As for requests, each row may soon want a page more.
            if self.running and missing + num_rows > self.pool.num_available:
                return
            self.background.popleft()
            self._start(sequence, self.pool.take(missing) or [], 0, now_s)
            num_rows, num_inside = num_rows + 1, num_inside + 1

    def _clear_background(self, num_rows: int, num_pages: int) -> None:
        """Have the background give way until requests have so many rows and a new one finds so many pages."""
        while inside := in_background(self.running):
            if num_rows + len(inside) <= self._max_batch_size and num_pages <= self.pool.num_available:
                return
            self._preempt(inside[-1])

    def _queue_of(self, sequence: Sequence) -> deque[Sequence]:
        return self.background if sequence.is_background else self.waiting

    def _readers(self, sequences: Iterable[Sequence]) -> list[Sequence]:
        """Those with more to compute than a usual row: of siblings only one, and none if one has read the prompt."""
        groups: set[int] = set()
        readers: list[Sequence] = []
        for sequence in sequences:
            if sequence.state is SequenceState.DECODING and sequence.num_unread > 1:
                readers.append(sequence)
            elif (
                sequence.state is SequenceState.PREFILLING
                and id(sequence.group) not in groups
                and not self._is_computed_by_sibling(sequence)
            ):
                groups.add(id(sequence.group))
                readers.append(sequence)
        return readers

    def _request_readers(self) -> list[Sequence]:
        return self._readers(of_requests(self.running))

    def _budget(self, num_rows: int) -> Budget:
        return Budget(self._chunk_tokens) if self._pace is None else self._pace.budget(num_rows, self._chunk_tokens)

    def _read(self, step: Step, budget: Budget, sequences: Iterable[Sequence]) -> None:
        """Share the budget out among prompts, and sequences that feed again what they had before.

        A choice whose prompt a sibling has computed, or computes in this step, needs no chunk of its own.
        """
        sequences = list(sequences)
        readers = sorted(self._readers(sequences), key=lambda reader: reader.arrival_s)
        unread = [Piece(reader.num_computed, reader.num_unread, reader.tells_prompt) for reader in readers]
        taken = dict(zip(map(id, readers), share_out(unread, budget), strict=True))
        computed: set[int] = set()
        for sequence in sequences:
            count = taken.get(id(sequence), 0)
            if not sequence.pages:
                continue
            if count and sequence.state is SequenceState.DECODING:
                if rows := self._decode_rows(sequence, min(count, _MAX_REPLAYED_TOKENS)):
                    step.decoding.append((sequence, rows))
            elif count and self._find_pages(sequence, sequence.prompt_len):
                chunk = _next_chunk(sequence, count)
                step.chunks.append((sequence, chunk))
                if chunk.end == sequence.prompt_len:
                    computed.add(id(sequence.group))
            if sequence.state is SequenceState.PREFILLING and (
                id(sequence.group) in computed or self._is_computed_by_sibling(sequence)
            ):
                step.complete.append(sequence)

    def _decode_rows(self, sequence: Sequence, count: int) -> list[DecodeRow]:
        """The rows of the next tokens that are not in the cache yet; none when there is no page for them."""
        first = sequence.num_computed
        end = first + count
        if not self._find_pages(sequence, end):
            return []
        if sequence.drawn is not None:
            return [DecodeRow(sequence.pages, first, 0, sequence.drawn)]
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
        """Preempt who was admitted last, before all in the background, until so many pages are there.

        False when that was the sequence itself.
        """
        while missing > self.pool.num_available:
            victim = [*of_requests(self.running), *in_background(self.running)][-1].owner
            self._preempt(victim)
            if victim is sequence.owner:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += not sequence.is_background
        self._evict(sequence)
        if sequence.state is SequenceState.PREFILLING and sequence.num_computed:
            # They come again with the prompt.
            del sequence.group.prompt_logprobs[1:]
            sequence.group.token_values.clear()
            if sequence.prompt_states is not None:
                sequence.prompt_states.clear()
        sequence.state, sequence.num_computed = SequenceState.WAITING, 0
        self._queue_of(sequence).appendleft(sequence)

    def _evict(self, sequence: Sequence, *, forget: bool = False) -> list[int]:
        forgotten = self._drop_candidates(sequence, forget=forget)
        for one in sequence.both:
            self.running.remove(one)
            one.group.residents.remove(one)
            forgotten += self.pool.release(one.pages, forget=forget)
            one.pages, one.waiting_D = [], None
        if (shadow := sequence.shadow) is not None:
            shadow.state, shadow.num_computed = SequenceState.WAITING, 0
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
        return any(one.num_computed >= one.prompt_len for one in _siblings(sequence))


def _siblings(sequence: Sequence) -> list[Sequence]:
    """Those that run."""
    return [one for one in sequence.group.residents if one is not sequence]


def _decodes(sequence: Sequence) -> bool:
    return sequence.state is SequenceState.DECODING


def _num_missing(sequence: Sequence, known: list[int]) -> int:
    """Pages that it lacks to read its prompt, of which these are known; one whose siblings run shares all but one."""
    return 1 if sequence.group.residents else num_pages_for(sequence.prompt_len) - len(known)


def _next_chunk(sequence: Sequence, count: int) -> PromptChunk:
    """About so many of the prompt's next tokens: to a page's end where that leaves out a quarter at most, since pages
    are attended one by one."""
    start = sequence.num_computed
    end = start + count
    paged = end // PAGE_TOKENS * PAGE_TOKENS
    if end < sequence.prompt_len and 4 * (end - paged) <= count:
        end = paged
    return PromptChunk(sequence.pages, start, sequence.group.token_ids[start:end])
