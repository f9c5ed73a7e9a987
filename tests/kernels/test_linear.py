"""Native matrix products against torch's, and their one law: a row has the same bits in every batch."""

from __future__ import annotations

import pytest
import torch

from server.kernels import linear, native
from server.kernels.linear import Bits, NativeLinear, can_run_natively, frozen_linear
from value_models.linear import PackedLinear

pytestmark = pytest.mark.skipif(native() is None, reason="no native kernels on this machine")


def weights(outputs: int = 75, inputs: int = 96) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(outputs)
    weight = (torch.randn(outputs, inputs, generator=rng) * 0.05).bfloat16()
    return weight, torch.randn(outputs, generator=rng), torch.randn(40, inputs, generator=rng).bfloat16()


@pytest.mark.parametrize(("bits", "error"), [(16, 1e-6), (8, 6e-3), (4, 8e-2)])
@pytest.mark.parametrize("outputs", [1, 16, 32, 75])
def test_a_product_is_torchs_within_what_its_bits_allow(outputs: int, bits: Bits, error: float) -> None:
    weight, bias, x = weights(outputs)
    expected = x.float() @ weight.float().T + bias
    got = NativeLinear(weight, bias, bits=bits, out_dtype=torch.float32)(x)
    assert (got - expected).norm() / expected.norm() < error


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_row_has_the_same_bits_in_every_batch(bits: Bits) -> None:
    weight, bias, x = weights()
    linear = NativeLinear(weight, bias, bits=bits)
    whole = linear(x)
    for rows in (1, 2, 3, 6, 7, 12, 13, 25):
        assert torch.equal(linear(x[:rows]), whole[:rows])
        assert torch.equal(linear(x[-rows:]), whole[-rows:])


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


def test_constant_groups_have_a_scale_of_zero_and_no_nan() -> None:
    for bits in (4, 8):
        linear = NativeLinear(torch.zeros(32, 64).bfloat16(), bits=bits)
        assert torch.equal(linear(torch.ones(3, 64).bfloat16()), torch.zeros(3, 32).bfloat16())


def test_what_no_kernel_takes_goes_through_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias, _ = weights()
    assert isinstance(frozen_linear(weight, bias), NativeLinear)
    assert not can_run_natively(weight[:, :80], bits=4)
    assert not can_run_natively(weight.float(), bits=8)
    monkeypatch.setattr(linear, "native", lambda: None)
    assert isinstance(frozen_linear(weight, bias), PackedLinear)
