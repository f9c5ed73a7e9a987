"""Which sequences a step holds, and which slot of the key-value cache each has.

Decoding sequences sit in the slots 0..B-1, so that attention reads the cache without gathering; prompts are computed in
the slots from the top down. Admission is first come, first served. A prompt is cut into chunks at fixed places, so how
it is computed never depends on its neighbours; a step takes chunks up to a token budget, so long prompts stall running
rows for one budget's time at most. Knows nothing of models, sampling or control.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from server.engines.embedded.attention import KVCache, Segment
from server.engines.embedded.sequence import Sequence, SequenceState
from server.types import FinishReason


class Scheduler:
    def __init__(self, kv: KVCache, *, max_batch_size: int, chunk_tokens: int, max_step_prefill_tokens: int) -> None:
        """The cache needs one slot more than max_batch_size, as scratch space for swaps."""
        assert kv.num_slots == max_batch_size + 1
        self.waiting: deque[Sequence] = deque()
        self.prefilling: deque[Sequence] = deque()
        self.decoding: list[Sequence] = []
        self._kv = kv
        self._max_batch_size = max_batch_size
        self._chunk_tokens = chunk_tokens
        self._max_step_prefill_tokens = max_step_prefill_tokens
        self._slots: dict[int, Sequence] = {}

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self._slots)

    @property
    def num_running(self) -> int:
        return len(self._slots)

    @property
    def num_cached_tokens(self) -> int:
        return sum(sequence.cached_len for sequence in self._slots.values())

    def sequences(self) -> Iterator[Sequence]:
        """Everything that is not finished."""
        yield from list(self._slots.values())
        yield from list(self.waiting)

    def admit(self, now_s: float) -> None:
        """Give free slots to waiting sequences, from the top down."""
        free = [slot for slot in reversed(range(self._max_batch_size)) if slot not in self._slots]
        for slot in free[: len(self.waiting)]:
            sequence = self.waiting.popleft()
            sequence.state, sequence.slot, sequence.scheduled_s = SequenceState.PREFILLING, slot, now_s
            sequence.group.residents.append(sequence)
            self._slots[slot] = sequence
            self.prefilling.append(sequence)

    def take_prefill(self) -> tuple[list[tuple[Sequence, Segment]], list[Sequence]]:
        """This step's prompt chunks, and the sequences whose prompt is complete after them, in order.

        A choice whose prompt a sibling has computed, or computes in this step, needs no chunk of its own.
        """
        chunks: list[tuple[Sequence, Segment]] = []
        complete: list[Sequence] = []
        budget = self._max_step_prefill_tokens
        for sequence in self.prefilling:
            if not self._is_computed_by_sibling(sequence):
                while budget > 0 and sequence.num_prefilled < sequence.prompt_len:
                    segment = self._next_chunk(sequence)
                    chunks.append((sequence, segment))
                    sequence.num_prefilled = segment.end
                    budget -= len(segment.token_ids)
                if sequence.num_prefilled < sequence.prompt_len:
                    break
            complete.append(sequence)
        return chunks, complete

    def start_decoding(self, sequence: Sequence) -> None:
        """The prompt is in the cache (its own slot's, or a sibling's): take the next decode slot."""
        self.prefilling.remove(sequence)
        if sequence.num_prefilled < sequence.prompt_len:
            donor = next(s for s in sequence.group.residents if s is not sequence and s.num_prefilled == s.prompt_len)
            self._kv.copy(donor.slot, sequence.slot, sequence.prompt_len)
            sequence.num_prefilled = sequence.prompt_len
        self._move(sequence, len(self.decoding))
        sequence.state = SequenceState.DECODING
        self.decoding.append(sequence)

    def remove(self, sequence: Sequence, reason: FinishReason) -> None:
        """Finish a sequence wherever it is and free its slot."""
        if sequence.state is SequenceState.WAITING:
            self.waiting.remove(sequence)
        else:
            self._kv.clear(sequence.slot, sequence.cached_len)
            del self._slots[sequence.slot]
            sequence.group.residents.remove(sequence)
            if sequence.state is SequenceState.PREFILLING:
                self.prefilling.remove(sequence)
            else:
                last = self.decoding.pop()
                if last is not sequence:
                    self.decoding[sequence.slot] = last
                    self._move(last, sequence.slot)
        sequence.state, sequence.finish_reason = SequenceState.FINISHED, reason

    def _is_computed_by_sibling(self, sequence: Sequence) -> bool:
        return any(s is not sequence and s.num_prefilled == s.prompt_len for s in sequence.group.residents)

    def _next_chunk(self, sequence: Sequence) -> Segment:
        start = sequence.num_prefilled
        return Segment(sequence.slot, start, sequence.group.token_ids[start : start + self._chunk_tokens])

    def _move(self, sequence: Sequence, target: int) -> None:
        """Move a sequence's keys and values to another slot, exchanging places with whoever holds that one."""
        source = sequence.slot
        if source == target:
            return
        occupant = self._slots.get(target)
        self._slots.pop(source, None)
        if occupant is not None:
            scratch = self._max_batch_size
            self._kv.copy(target, scratch, occupant.cached_len)
        self._kv.copy(source, target, sequence.cached_len)
        occupant_len = 0
        if occupant is not None:
            occupant_len = occupant.cached_len
            self._kv.copy(self._max_batch_size, source, occupant_len)
            occupant.slot = source
            self._slots[source] = occupant
        # What was longer leaves no tail behind.
        self._kv.clear(source, sequence.cached_len, start=occupant_len)
        self._kv.clear(target, occupant_len, start=sequence.cached_len)
        sequence.slot = target
        self._slots[target] = sequence
