import pytest
import torch
from torch import nn

from value_models.linear import PackedLinear

ROWS = [2, 3, 5, 8, 13, 31, 32, 33, 64, 100]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size_in", "size_out"), [(576, 192), (1536, 576), (33, 1), (1, 33), (257, 257)])
def test_a_row_has_the_same_bits_in_every_batch(dtype: torch.dtype, size_in: int, size_out: int) -> None:
    linear = PackedLinear(torch.randn(size_out, size_in).to(dtype), torch.randn(size_out).to(dtype))
    x = torch.randn(100, size_in).to(dtype)
    whole = linear(x)
    for rows in ROWS:
        chosen = torch.randperm(100)[:rows]
        assert torch.equal(linear(x[chosen]), whole[chosen]), rows


def test_a_single_row_equals_the_same_row_among_others() -> None:
    linear, x = PackedLinear(torch.randn(576, 1536)), torch.randn(9, 1536)
    assert torch.equal(linear(x[4:5]), linear(x)[4:5])


@pytest.mark.parametrize("shape", [(7, 20), (2, 3, 20), (1, 20)])
def test_it_is_the_linear_map(shape: tuple[int, ...]) -> None:
    plain = nn.Linear(20, 11).requires_grad_(False)
    x = torch.randn(shape)
    torch.testing.assert_close(PackedLinear(plain.weight, plain.bias)(x), plain(x))
