"""Ctrl-C and SIGTERM end a command at once and in silence, whatever it does: import, load a model, compute.

KeyboardInterrupt cannot do that: asyncio waits for the threads that load, and where it comes up inside an import or a
destructor a traceback is printed. Files are written whole or not at all (`value_models.files`), so nothing is lost. A
server that is up handles both signals itself (`http.py`), and raises them anew when it has ended. Enter at
`ending_at_once`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_last_acts: list[Callable[[], None]] = []


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Within it, SIGINT ends the process with status 130 and SIGTERM with 143, as a shell shows them.

    By handlers, since the first process of a container ignores signals that it has none for: it would load its model
    to the end. Nothing changes outside the main thread, where Python takes no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _end) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def before_the_end(act: Callable[[], None]) -> None:
    """Have a signal that ends the process do this first, since no `finally` is come to. It must be quick."""
    _last_acts.append(act)


def _end(number: int, frame: FrameType | None) -> None:
    del frame
    try:
        for act in _last_acts:
            act()
    finally:
        os._exit(128 + number)
