"""Native matrix products of every level, and their one law: a row has the same bits in every batch."""

from __future__ import annotations

import pytest
import torch

from server.kernels import Kernels, linear, native
from server.kernels.linear import Bits, NativeLinear, can_run_natively, frozen_linear
from value_models.linear import PackedLinear

ROW_COUNTS = (*range(1, 101), 257)
SIZES = [(1, 1), (33, 1), (1, 33), (75, 96), (31, 2), (257, 255), (192, 576)]
"""Outputs and inputs."""


@pytest.fixture
def of_level(library: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "native", lambda: library)


each_level = pytest.mark.usefixtures("of_level")


def weights(
    outputs: int = 75, inputs: int = 96, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(outputs)
    weight = (torch.randn(outputs, inputs, generator=rng) * 0.05).to(dtype)
    return weight, torch.randn(outputs, generator=rng).to(dtype), torch.randn(257, inputs, generator=rng).to(dtype)


def assert_rows_are_as_alone(linear: NativeLinear, x: torch.Tensor) -> None:
    """In any number of rows, and at any place among them."""
    whole, rng = linear(x), torch.Generator().manual_seed(0)
    for rows in ROW_COUNTS:
        chosen = torch.randperm(len(x), generator=rng)[:rows]
        assert torch.equal(linear(x[chosen]), whole[chosen]), rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
@each_level
def test_a_product_is_right_within_the_rounding_of_float32_and_a_row_has_the_same_bits_in_every_batch(
    outputs: int, inputs: int, dtype: torch.dtype
) -> None:
    weight, bias, x = weights(outputs, inputs, dtype)
    linear = NativeLinear(weight, bias, out_dtype=torch.float32)
    exact = x.double() @ weight.double().T + bias.double()
    size = x.double().abs() @ weight.double().abs().T + bias.double().abs()
    # Of a sum of n products in any order, each step rounded to the nearest.
    assert ((linear(x).double() - exact).abs() <= (inputs + 2) * 2.0**-24 * size).all()
    assert_rows_are_as_alone(linear, x)


@pytest.mark.parametrize(("bits", "error"), [(16, 1e-6), (8, 6e-3), (4, 8e-2)])
@pytest.mark.parametrize("outputs", [1, 16, 32, 75])
@each_level
def test_a_product_is_torchs_within_what_its_bits_allow(outputs: int, bits: Bits, error: float) -> None:
    weight, bias, x = weights(outputs)
    expected = x.float() @ weight.float().T + bias.float()
    got = NativeLinear(weight, bias, bits=bits, out_dtype=torch.float32)(x)
    assert (got - expected).norm() / expected.norm() < error


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("outputs", "inputs"), [(75, 96), (1, 32), (64, 576)])
@each_level
def test_a_row_has_the_same_bits_in_every_batch_in_fewer_bits_too(outputs: int, inputs: int, bits: Bits) -> None:
    weight, bias, x = weights(outputs, inputs)
    assert_rows_are_as_alone(NativeLinear(weight, bias, bits=bits), x)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [1e-39, 1e-37, 1.0])
@each_level
def test_a_row_alone_has_the_same_bits_as_in_a_batch_down_to_the_least_of_numbers(bits: Bits, size: float) -> None:
    """One row may go another way, on which sums that cancel to less than the normal numbers must not differ."""
    weight, _, x = weights(64, 640)
    x = (x[:12].double() * size).to(torch.bfloat16)
    linear = NativeLinear(weight, bits=bits, out_dtype=torch.float32)
    whole = linear(x)
    assert all(torch.equal(linear(row[None])[0], of_whole) for row, of_whole in zip(x, whole, strict=True))


@each_level
def test_a_row_that_is_not_finite_stays_by_itself() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weight, bias, x = weights(40, 47, dtype)
        linear = NativeLinear(weight, bias)
        broken = x[:40].clone()
        broken[3], broken[17, 46], broken[39, 0] = float("inf"), float("nan"), -float("inf")
        whole, good = linear(broken), [i for i in range(40) if i not in (3, 17, 39)]
        assert torch.equal(whole[good], linear(x[:40])[good])
        assert not whole[[3, 17, 39]].isfinite().any()


@each_level
def test_weights_that_lie_on_the_grid_of_four_bits_are_kept_but_for_rounding() -> None:
    rng = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 16, (64, 4, 32), generator=rng)
    numbers[..., 0], numbers[..., 1] = 0, 15  # every group reaches both its ends
    scale, least = torch.rand(64, 4, 1, generator=rng).half(), torch.randn(64, 4, 1, generator=rng).half()
    weight = (scale.float() * numbers + least.float()).flatten(1).bfloat16()
    x = torch.randn(8, 128, generator=rng).bfloat16()
    expected = x.float() @ weight.float().T
    got = NativeLinear(weight, bits=4, out_dtype=torch.float32)(x)
    assert (got - expected).norm() / expected.norm() < 4e-3


@each_level
def test_constant_groups_have_a_scale_of_zero_and_no_nan() -> None:
    for bits in (4, 8):
        linear = NativeLinear(torch.zeros(32, 64).bfloat16(), bits=bits)
        assert torch.equal(linear(torch.ones(3, 64).bfloat16()), torch.zeros(3, 32).bfloat16())


@each_level
def test_no_rows_give_no_rows_and_another_type_is_refused() -> None:
    weight, bias, x = weights()
    for bits in (4, 8, 16):
        linear = NativeLinear(weight, bias, bits=bits)
        assert linear(x[:0]).shape == (0, 75)
        with pytest.raises(TypeError, match="float32, the weight torch"):
            linear(x.float())


@pytest.mark.skipif(native() is None, reason="no native kernels on this machine")
def test_what_no_kernel_takes_goes_through_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias, _ = weights()
    assert isinstance(frozen_linear(weight, bias), NativeLinear)
    assert not can_run_natively(weight[:, :80], bits=4)
    assert not can_run_natively(weight.float(), bits=8)
    monkeypatch.setattr(linear, "native", lambda: None)
    assert isinstance(frozen_linear(weight, bias), PackedLinear)
