"""Native kernels of the decoding step, for x86 processors from AVX2 on; elsewhere torch's own operations do.

Setuptools compiles the C++ beside this file, once for each level of processor, when the package is installed
(setup.py). `native()` gives the functions of the highest level that this machine has, or None where there are none:
then every caller has a path through torch, which tests hold against this one. The functions take addresses and sizes,
check nothing, and release the interpreter's lock; `linear.py` and `ops.py` are their face for tensors. They compute on
threads of their own (pool.h), as many as torch is set to.

On every level, and in torch's place too, a row's numbers depend on that row alone. Between levels they differ in their
last bits. Knows nothing of models, requests or control.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import itertools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from server.errors import ConfigurationError

_log = logging.getLogger(__name__)
LEVELS = ("avx2", "avx512", "avx512_bf16", "amx")
"""What a processor must have, each with all of those before it."""
VARIABLE = "RECONTROL_KERNELS"
"""In the environment: `torch` to do without kernels, or the level to use. `triton` is for gpu/, and none of these."""
_P, _I, _F, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
# As in the .cpp files, in the order of their parameters after the number of threads.
_ATTENTION = (_P, _P, _P, _I, _I, _I, _P, _P, _P, _I, _P, _P, _P, _P, _I, _I, _I, _I, _I, _F, _F, _I, _I)
_SIGNATURES = {
    "pack_f32": (_P, _I, _I, _P),
    "pack_bf16": (_P, _I, _I, _P),
    "linear_f32": (_P, _P, _P, _P, _I, _I, _I, _INT),
    "linear_bf16": (_P, _P, _P, _P, _I, _I, _I, _INT),
    "linear_int4": (_P, _P, _P, _P, _P, _I, _I, _I, _INT),
    "linear_int8": (_P, _P, _P, _P, _P, _I, _I, _I, _INT),
    "add_rms_norm_bf16": (_P, _P, _P, _P, _I, _I, _F),
    "silu_mul_bf16": (_P, _P, _I, _I),
    "rotate_bf16": (_P, _I, _P, _P, _P, _I, _I, _I),
    "paged_attention_bf16": _ATTENTION,
    "paged_attention_f32": _ATTENTION,
    "sample_f32": (_P, _I, _I, _P, _P, _P, _P, _P, _P),
    "largest_scales_f32": (_P, _I, _I, _P, _I, _P, _P, _P, _P),
    "combine_rows_f32": (_P, _I, _I, _P, _I, _P),
    "edit_straight_f32": (_P, _I, _I, _P, _I, _P, _I, _P, _P, _P, _P, _P),
    "move_rows_f32": (_P, _I, _I, _P, _I, _P, _P),
    "edit_shared": (_P, _INT, _I, _P, _I, _P, _I, _P, _I, _P, _P, _I, _I, _P, _P, _P, _P, _I, _F, _F),
}


class Kernels(ctypes.CDLL):
    """The compiled functions of one level."""

    level: str


@functools.cache
def native() -> Kernels | None:
    """The compiled functions, or None; says why once. RECONTROL_KERNELS in the environment chooses.

    Raises ConfigurationError where that names what this machine does not have.
    """
    told = os.environ.get(VARIABLE, "")
    if told == "torch":
        return None
    told = "" if told == "triton" else told
    levels = machine_levels()
    compiled = {level: kernels for level in levels if (kernels := kernels_of(level)) is not None}
    if told and told not in compiled:
        allowed = ", ".join(["torch", "triton", *compiled])
        raise ConfigurationError(f"{VARIABLE}: {told!r} cannot be used here; leave it empty, or one of {allowed}")
    if not levels:
        _log.info("No native kernels: this CPU has no AVX2; torch's operations are used")
    elif not compiled:
        _log.warning("No native kernels: they were not compiled (a C++ compiler at `pip install` does); slower without")
    elif levels[-1] not in compiled:
        _log.warning("Native kernels for %s were not compiled (a newer C++ compiler does); slower without", levels[-1])
    return compiled.get(told or next(reversed(compiled), ""))


def machine_levels() -> tuple[str, ...]:
    """The levels that this processor and its operating system have, the lowest first."""
    has = torch.cpu
    # Linux keeps the tiles of AMX only for processes that have asked for it.
    checks = (
        has._is_avx2_supported, has._is_avx512_supported, has._is_avx512_bf16_supported,
        lambda: has._is_amx_tile_supported() and has._init_amx(),
    )  # fmt: skip
    return tuple(level for level, _ in itertools.takewhile(lambda pair: pair[1](), zip(LEVELS, checks, strict=True)))


@functools.cache
def kernels_of(level: str) -> Kernels | None:
    """Those compiled for a level; None if they were not, or this machine does not have it."""
    if level not in machine_levels():
        return None
    stem = Path(__file__).with_name(f"_native_{level}")
    files = [stem.with_name(stem.name + suffix) for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return None
    library = Kernels(str(file))
    library.level = level
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = (_I, *arguments), _INT
        setattr(library, name, _by_threads(function))
    return library


def _by_threads(function: Callable[..., int]) -> Callable[..., None]:
    """The function on as many threads as torch computes with, as the calling thread has them when it calls."""

    def call(*arguments: Any) -> None:
        if function(torch.get_num_threads(), *arguments) != 0:
            raise MemoryError("There was not enough memory for a native kernel's own work.")

    return call
