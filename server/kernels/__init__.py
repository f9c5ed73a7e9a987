"""Native kernels of the decoding step, for CPUs with AVX-512 and bfloat16; elsewhere torch's own operations do.

Setuptools compiles the C++ beside this file when the package is installed. `native()` gives the functions, or None
where the library was not built or the CPU lacks the instructions: then every caller has a path through torch, which
tests hold against this one. The functions take addresses and sizes, check nothing, and release the interpreter's lock;
`linear.py` and `ops.py` are their face for tensors. Knows nothing of models, requests or control.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import logging
import os
from pathlib import Path

import torch

_log = logging.getLogger(__name__)
_P, _I, _F, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
# As in the .cpp files, in the order of their parameters.
_SIGNATURES = {
    "pack_bf16": (_P, _I, _I, _P),
    "linear_bf16": (_P, _I, _P, _P, _P, _I, _I, _I, _INT),
    "linear_int4": (_P, _I, _P, _P, _P, _P, _I, _I, _I, _INT),
    "linear_int8": (_P, _I, _P, _P, _P, _P, _I, _I, _I, _INT),
    "add_rms_norm_bf16": (_P, _P, _P, _P, _I, _I, _F),
    "silu_mul_bf16": (_P, _P, _I, _I),
    "rotate_bf16": (_P, _I, _P, _P, _P, _I, _I, _I),
    "paged_attention_bf16": (_P, _P, _P, _I, _I, _I, _P, _P, _P, _I, _P, _P, _P, _I, _I, _I, _I, _F, _F, _I),
    "sample_f32": (_P, _I, _I, _P, _P, _P, _P, _P, _P),
    "largest_scales_f32": (_P, _I, _I, _P, _P, _P, _P, _P),
    "edit_shared": (_P, _INT, _I, _P, _I, _P, _I, _P, _P, _P, _I, _I, _P, _P, _P, _P, _I, _F, _F, _P, _INT),
}


@functools.cache
def native() -> ctypes.CDLL | None:
    """The compiled functions, or None; says why once. RECONTROL_KERNELS=torch in the environment does without."""
    if os.environ.get("RECONTROL_KERNELS") == "torch":
        return None
    if not torch.cpu._is_avx512_bf16_supported():
        _log.info("No native kernels: this CPU has no AVX-512 with bfloat16; torch's operations are used")
        return None
    files = [Path(__file__).with_name(f"_native{suffix}") for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        _log.warning("No native kernels: they were not compiled (a C++ compiler at `pip install` does); slower without")
        return None
    # torch is loaded by now, and with it the OpenMP runtime whose threads both use.
    library = ctypes.CDLL(str(file))
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library
