"""What Triton demands of a backend's compiler; never asked."""

from __future__ import annotations

from typing import Any, NoReturn

from triton.backends.compiler import BaseBackend  # pyright: ignore[reportMissingImports]


def refuse(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError("Triton compiles nothing on this CPU; set TRITON_INTERPRET=1")


class NoCompiler(BaseBackend):
    supports_target = staticmethod(refuse)
    hash = parse_options = add_stages = load_dialects = get_module_map = refuse
