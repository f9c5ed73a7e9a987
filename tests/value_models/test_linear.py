"""Torch's map whose sums are exact: it is the linear map, and nothing but a row itself can be seen in its bits."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from value_models.linear import PackedLinear

ROWS = [1, 2, 3, 5, 8, 13, 31, 32, 33, 64, 100]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size_in", "size_out"), [(576, 192), (1536, 576), (33, 1), (1, 33), (257, 257)])
def test_a_row_has_the_same_bits_in_every_batch(dtype: torch.dtype, size_in: int, size_out: int) -> None:
    linear = PackedLinear(torch.randn(size_out, size_in).to(dtype), torch.randn(size_out).to(dtype))
    x = torch.randn(100, size_in).to(dtype)
    whole = linear(x)
    for rows in ROWS:
        chosen = torch.randperm(100)[:rows]
        assert torch.equal(linear(x[chosen]), whole[chosen]), rows


def test_the_order_of_inputs_and_the_number_of_threads_cannot_be_seen(threads: None) -> None:
    weight, x = torch.randn(64, 1000), torch.randn(9, 1000)
    expected, order = PackedLinear(weight)(x), torch.randperm(1000)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert torch.equal(PackedLinear(weight[:, order])(x[:, order]), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 100, 4097])
def test_it_is_exact_but_for_the_last_rounding_and_what_is_far_below_a_rows_largest_entry(
    dtype: torch.dtype, size: int
) -> None:
    rng = torch.Generator().manual_seed(size)
    weight, x = torch.randn(7, size, generator=rng).to(dtype), torch.randn(5, size, generator=rng)
    x[0, 0], x[1] = 3e3, x[1] * 1e-6
    x = x.to(dtype)
    exact = x.double() @ weight.double().T
    largest = x.double().abs().amax(dim=1)[:, None] * weight.double().abs().amax(dim=1)
    bits = (53 - math.ceil(math.log2(size))) // 2 * (2 if dtype == torch.float32 else 1)
    info = torch.finfo(dtype)
    allowed = info.eps / 2 * exact.abs() + 8 * size * 2.0**-bits * largest + info.smallest_normal * info.eps
    assert ((PackedLinear(weight)(x).double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e30])
def test_numbers_at_both_ends_of_float32_are_told_apart(scale: float) -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]) * scale
    assert torch.equal(PackedLinear(torch.tensor([[1.0, 0.0, -1.0]]))(x)[:, 0], x[:, 0] - x[:, 2])


def test_a_row_that_is_not_finite_stays_by_itself() -> None:
    linear, x = PackedLinear(torch.randn(20, 30)), torch.randn(6, 30)
    broken = x.clone()
    broken[1, 3], broken[4, 7] = float("nan"), float("inf")
    got = linear(broken)
    assert torch.equal(got[[0, 2, 3, 5]], linear(x)[[0, 2, 3, 5]])
    assert not got[[1, 4]].isfinite().any()


@pytest.mark.parametrize("shape", [(7, 20), (2, 3, 20), (1, 20), (0, 20)])
def test_it_is_the_linear_map(shape: tuple[int, ...]) -> None:
    plain = nn.Linear(20, 11).requires_grad_(False)
    x = torch.randn(shape)
    torch.testing.assert_close(PackedLinear(plain.weight, plain.bias)(x), plain(x))


def test_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match="bfloat16, the weight torch"):
        PackedLinear(torch.randn(3, 4))(torch.randn(2, 4).bfloat16())
