"""What stands between the products of a Llama-like layer, on every level, against torch's operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from server.kernels import Kernels

EPSILON = 1e-5
ROWS, SIZE = 70, 96


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def normed(library: Any, x: Tensor | None, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The norm of what `residual` becomes, and that."""
    residual, out = residual.clone(), torch.empty_like(residual)
    x_at = None if x is None else x.data_ptr()
    library.add_rms_norm_bf16(
        x_at, residual.data_ptr(), weight.data_ptr(), out.data_ptr(), *residual.shape, EPSILON
    )  # fmt: skip
    return out, residual


def activated(library: Any, gate_up: Tensor) -> Tensor:
    out = torch.empty(len(gate_up), gate_up.shape[1] // 2, dtype=torch.bfloat16)
    library.silu_mul_bf16(gate_up.data_ptr(), out.data_ptr(), *out.shape)
    return out


def rotated(library: Any, heads: Tensor, positions: Tensor, angles: Tensor) -> Tensor:
    """heads [rows, heads, size], angles [positions, size / 2]."""
    out, cosines, sines = heads.clone(), angles.cos(), angles.sin()
    library.rotate_bf16(
        out.data_ptr(), heads[0].numel(), positions.data_ptr(), cosines.data_ptr(), sines.data_ptr(), *heads.shape
    )  # fmt: skip
    return out


def assert_close(got: Tensor, expected: Tensor) -> None:
    """Within two roundings to bfloat16."""
    torch.testing.assert_close(got.float(), expected, atol=1e-6, rtol=2.0**-7)


def test_a_norm_is_torchs_with_and_without_something_to_add(library: Kernels) -> None:
    x, residual, weight = numbers(ROWS, SIZE, seed=1), numbers(ROWS, SIZE, seed=2), numbers(SIZE, seed=3)
    for added in (None, x):
        out, became = normed(library, added, residual, weight)
        assert torch.equal(became, residual if added is None else residual + x)
        assert_close(out, functional.rms_norm(became.float(), (SIZE,), weight.float(), EPSILON))


def test_activations_are_torchs_also_where_they_vanish(library: Kernels) -> None:
    gate_up = numbers(ROWS, 2 * SIZE)
    gate_up[0, :4] = torch.tensor([-120.0, 120.0, 0.0, -3e38])
    gate, up = gate_up.float().split(SIZE, dim=1)
    assert_close(activated(library, gate_up), functional.silu(gate).bfloat16().float() * up)


def test_a_rotation_turns_halves_of_heads_by_their_positions_angles(library: Kernels) -> None:
    heads, positions = numbers(ROWS, 3, 64), torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
    angles = torch.randn(ROWS, 32, generator=torch.Generator().manual_seed(1))
    a, b = heads.float().split(32, dim=2)
    cosine, sine = angles[positions][:, None].cos(), angles[positions][:, None].sin()
    expected = torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=2)
    torch.testing.assert_close(rotated(library, heads, positions, angles).float(), expected, atol=2e-2, rtol=2.0**-7)


@pytest.mark.parametrize("rows", [1, 2, 5, 33])
def test_a_row_is_as_alone_and_a_broken_one_stays_by_itself(library: Kernels, rows: int) -> None:
    weight, angles = numbers(SIZE, seed=3), torch.randn(ROWS, 16, generator=torch.Generator().manual_seed(1))
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda x: normed(library, x, x, weight)[0],
        lambda x: activated(library, x),
        lambda x: rotated(library, x.unflatten(1, (3, 32)).contiguous(), torch.arange(len(x)) % 1, angles).flatten(1),
    ]
    x = numbers(ROWS, SIZE)
    broken = x.clone()
    broken[rows:] = float("nan")
    for way in ways:
        assert torch.equal(way(x[:rows].clone()), way(x)[:rows])
        assert torch.equal(way(broken)[:rows], way(x)[:rows])
