"""Triton's interpreter made quicker, and its products of matrices the same wherever a row is in a tile.

Within a kernel it would patch Triton's language anew for every function called, which takes a millisecond each, and
`tl.sum` is such a function. Its products are numpy's, whose library may add up a row in another order at another place
of the matrix (seen with AVX2), which a GPU's units do not. Enter at `quicken` and `add_in_order`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
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


def add_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the test: `tl.dot` adds the products of each element one after the other."""
    from triton.runtime import interpreter

    def create_dot(_: Any, a: Any, b: Any, d: Any, *__: Any) -> Any:
        total = np.zeros_like(d.data)
        for column, row in zip(a.data.T, b.data, strict=True):
            total += column[:, None].astype(total.dtype) * row.astype(total.dtype)
        return interpreter.TensorHandle(total + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def _then(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def both() -> None:
        first()
        second()

    return both
