"""The running engine as a thread beside it sees it, which reads texts in the engine's spare rows.

To sources of texts (`EngineTextSource`, `EngineInstructedSource`) it is what an `EngineCore` is, so that a head is
trained on the same numbers in a server as by the command line: rows do not depend on what runs beside them. Enter at
`SpareRows`.
"""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from server.engines.base import NullObserver
from server.engines.embedded.core import EngineCore
from server.engines.embedded.model.lm_head import LMHead
from server.engines.embedded.model.loader import LoadedModel
from server.engines.embedded.model.pages import PagePool
from server.engines.embedded.sequence import Sequence
from server.errors import EngineStoppedError, GenerationError
from server.types import FinishReason, GenerationChunk, GenerationRequest, SamplingParams

_POLL_S = 0.1
"""How long a wait may go on without a look at whether it is still wanted."""
_PIECE_ROWS = 32
"""Of which logits are computed at once, so that requests find the kernels' threads free in between."""


class SpareRows:
    """Used from one thread, which is not the engine's; `check` is called often and may raise to end the work."""

    def __init__(
        self,
        loaded: LoadedModel,
        core: EngineCore,
        post: Callable[[Callable[[], None]], None],
        check: Callable[[], None],
    ) -> None:
        """`post` hands an action to the engine's thread."""
        self.loaded = loaded
        self.lm_head: LMHead = _PatientHead(core.lm_head, check, lambda: core.status().num_running > 0)
        self.max_model_len = core.max_model_len
        self._core = core
        self._post = post
        self._check = check
        self._chunks: queue.SimpleQueue[tuple[Callable[[GenerationChunk], None], GenerationChunk]] = queue.SimpleQueue()
        self._open: list[Sequence] = []

    @property
    def page_pool(self) -> PagePool:
        """Whose size may be asked for."""
        return self._core.page_pool

    def check(self, request: GenerationRequest) -> None:
        """See `EngineCore.check`."""
        self._core.check(request)

    def sequences(
        self, request: GenerationRequest, emit: Callable[[GenerationChunk], None], *, keep_states: bool = False
    ) -> list[Sequence]:
        """The request's choices, ready for `add`; `emit` is called in this thread, by `step`."""
        put = partial(self._put, emit)
        choices = self._core.sequences(request, put, keep_states=keep_states, observer=NullObserver())
        for sequence in choices:
            sequence.is_background = True
        return choices

    def add(self, sequences: list[Sequence]) -> None:
        """Raises EngineStoppedError."""
        self._open = [sequence for sequence in self._open if sequence.finish_reason is None] + sequences
        self._post(lambda: self._core.add(sequences))

    def step(self) -> None:
        """Wait for the next chunk of a sequence that was added, and hand it on.

        Raises EngineStoppedError, GenerationError when the engine fails, and what `check` raises.
        """
        while True:
            self._check()
            try:
                emit, chunk = self._chunks.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            if chunk.finish_reason is FinishReason.ABORT:
                raise EngineStoppedError("The engine was stopped.")
            if chunk.finish_reason is FinishReason.ERROR:
                raise GenerationError("The engine failed on a text; its log says why.")
            emit(chunk)
            return

    def states(self, token_ids: list[int]) -> Tensor:
        """The states [T, D] behind a text."""
        return self.states_of([token_ids])[0]

    def states_of(self, texts: list[list[int]]) -> list[Tensor]:
        """The states [T, D] behind each of some texts. Raises as `step` does, ContextLengthError for one too long."""
        unread = set(range(len(texts)))
        readers: list[Sequence] = []
        for index, token_ids in enumerate(texts):
            request = GenerationRequest(f"text-{index}", tuple(token_ids), SamplingParams(max_tokens=0))
            self.check(request)
            (reader,) = self.sequences(request, lambda _, index=index: unread.discard(index))
            reader.prompt_states = []
            readers.append(reader)
        self.add(readers)
        while unread:
            self.step()
        return [torch.cat(reader.prompt_states or []) for reader in readers]

    def close(self) -> None:
        """Give up what is not finished."""
        unfinished = [sequence for sequence in self._open if sequence.finish_reason is None]
        self._open = []
        if unfinished:
            # An engine that has stopped has ended them.
            with contextlib.suppress(EngineStoppedError):
                self._post(lambda: self._core.abort(unfinished))

    def _put(self, emit: Callable[[GenerationChunk], None], chunk: GenerationChunk) -> None:
        """In the engine's thread."""
        self._chunks.put((emit, chunk))


class _PatientHead(LMHead):
    """The same map, applied a few rows at a time: while requests run it rests as long as it worked."""

    def __init__(self, head: LMHead, check: Callable[[], None], has_requests: Callable[[], bool]) -> None:
        # Without what `head` has cached: what is cached here goes with the job.
        self.__dict__.update({name: value for name, value in vars(head).items() if name != "_transposed"})
        self._check = check
        self._has_requests = has_requests

    def project(self, hidden_MD: Tensor) -> Tensor:
        return torch.cat(list(self._pieces(hidden_MD)))

    def _pieces(self, hidden_MD: Tensor) -> Iterator[Tensor]:
        for piece in hidden_MD.split(_PIECE_ROWS):
            self._check()
            started_s = time.perf_counter()
            yield super().project(piece)
            if self._has_requests():
                time.sleep(time.perf_counter() - started_s)
