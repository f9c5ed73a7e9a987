"""An accepted request's chunks on their way to its one reader, whatever thread they come from.

Knows nothing of engines. Enter at `ChunkQueue`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator

from server.types import GenerationChunk


class ChunkQueue:
    """The `ChunkStream` of a request of so many choices; made on the event loop that reads it.

    `on_close` is called once, with whether every choice had ended by then.
    """

    def __init__(self, num_choices: int, on_close: Callable[[bool], None]) -> None:
        self._chunks: asyncio.Queue[Iterable[GenerationChunk]] = asyncio.Queue()
        self._next: Iterator[GenerationChunk] = iter(())
        self._loop = asyncio.get_running_loop()
        self._num_unfinished = num_choices
        self._on_close: Callable[[bool], None] | None = on_close

    def put(self, chunk: GenerationChunk) -> None:
        self._chunks.put_nowait((chunk,))

    def put_threadsafe(self, chunk: GenerationChunk) -> None:
        self.put_all_threadsafe((chunk,))

    def put_all_threadsafe(self, chunks: Iterable[GenerationChunk]) -> None:
        """They are asked for one by one, as they are read, and on the event loop."""
        # A loop that has closed has no reader left.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._chunks.put_nowait, chunks)

    def __aiter__(self) -> ChunkQueue:
        return self

    async def __anext__(self) -> GenerationChunk:
        if self._on_close is None or not self._num_unfinished:
            await self.aclose()
            raise StopAsyncIteration
        while (chunk := next(self._next, None)) is None:
            self._next = iter(await self._chunks.get())
        self._num_unfinished -= chunk.finish_reason is not None
        return chunk

    async def aclose(self) -> None:
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close(not self._num_unfinished)
