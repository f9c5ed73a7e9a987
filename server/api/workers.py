"""Threads for work that takes as long as what a caller sends or gets is large, so that the event loop does none of it.

Large work has a lane of its own, in which a few callers with megabytes wait for each other and nobody else for them.
Beside the event loop such work must be made of small steps, since a step in C holds up everything else in the process:
texts are read by the tokenizer outside of Python's lock, and answers are written piece by piece (`json_text.py`). Knows
nothing of what the work is. Enter at `Workers.run`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from server.errors import OverloadedError

LARGE = 2**14
"""Characters of a text, or tokens and log-probabilities of an answer."""
_Result = TypeVar("_Result")


class _Lane:
    def __init__(self, name: str, *, num_threads: int, most_waiting: int) -> None:
        self.most_waiting = most_waiting
        self.num_waiting = 0
        self._make = partial(ThreadPoolExecutor, num_threads, thread_name_prefix=f"recontrol-{name}")
        self._executor: ThreadPoolExecutor | None = None

    @property
    def executor(self) -> ThreadPoolExecutor:
        if self._executor is None:
            self._executor = self._make()
        return self._executor

    def close(self) -> None:
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=False, cancel_futures=True)


class Workers:
    """Of one server. Threads are started as they are needed, also anew in a server that is started again."""

    def __init__(self) -> None:
        self._small = _Lane("small", num_threads=2, most_waiting=2048)
        self._large = _Lane("large", num_threads=1, most_waiting=64)

    async def run(self, work: Callable[[], _Result], *, size: int) -> _Result:
        """What `work` gives, computed in a thread of its size's lane. Raises OverloadedError, and what it raises."""
        lane = self._large if size > LARGE else self._small
        if lane.num_waiting >= lane.most_waiting:
            raise OverloadedError(f"{lane.num_waiting} texts wait to be read already; try again later.")
        lane.num_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(lane.executor, work)
        finally:
            lane.num_waiting -= 1

    def close(self) -> None:
        """What waits is given up, and what runs ends by itself."""
        for lane in (self._small, self._large):
            lane.close()
