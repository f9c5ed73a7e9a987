"""On what a model is computed, and in what numbers, where that is left to this program. Enter at `resolve_device`."""

from __future__ import annotations

import torch

from server.errors import ModelLoadError


def resolve_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelLoadError("device: cuda was asked for, but torch sees no CUDA device. Use auto or cpu.")
    return torch.device(device)


def resolve_dtype(dtype: str, device: torch.device, *, has_native_kernels: bool = False) -> torch.dtype:
    """What `auto` stands for: bfloat16 where it is fast, which is wherever this program's own kernels compute."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cuda":
        is_fast = torch.cuda.is_bf16_supported()
    else:
        # The kernels widen bfloat16 as they read it, and reading weights is most of what a step takes.
        is_fast = has_native_kernels or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if is_fast else torch.float32
