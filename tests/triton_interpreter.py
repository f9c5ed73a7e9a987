"""Triton's interpreter made quicker: within a kernel it would patch Triton's language anew for every function called.

That takes a millisecond each, and `tl.sum` is such a function. Enter at `quicken`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def quicken(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the test: patch the language when a kernel begins, and not again before it has ended."""
    import triton.language as tl
    from triton.runtime import interpreter

    plain = interpreter._patch_lang
    patched: set[frozenset[int]] = set()

    def patch_once(fn: Any) -> Any:
        key = frozenset(id(value) for value in fn.__globals__.values() if value is tl or value is tl.core)
        if key in patched:
            return None
        is_kernel = not patched
        patched.add(key)
        scope = plain(fn)
        if is_kernel:
            scope.restore = _then(scope.restore, patched.clear)
        return scope

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)


def _then(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def both() -> None:
        first()
        second()

    return both
