"""Activation functions give a row the same bits in every batch, on every number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN, get_activation

from server.engines.embedded.model.activations import RowsAlone, compute_rows_alone

SIZE = 11_008
"""Of a model of 7 billion weights: seven rows end within vectors when three threads share them."""


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def a_model(activation: nn.Module) -> nn.Module:
    layer = nn.Module()
    layer.act_fn = activation
    model = nn.Module()
    model.layers = nn.ModuleList([layer])
    compute_rows_alone(model)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "quick_gelu", "sigmoid"])
def test_a_row_is_as_alone_and_its_numbers_are_the_functions(name: str, dtype: torch.dtype) -> None:
    layer, x = a_model(get_activation(name)), torch.randn(1, 7, SIZE).to(dtype)
    whole = layer.act_fn(x)
    for row in range(7):
        assert torch.equal(layer.act_fn(x[:, row : row + 1]), whole[:, row : row + 1])
    torch.testing.assert_close(whole, ACT2FN[name](x))


def test_what_rounds_nothing_and_what_is_no_activation_stays() -> None:
    assert isinstance(a_model(nn.ReLU()).act_fn, nn.ReLU)
    assert isinstance(a_model(nn.LayerNorm(3)).act_fn, nn.LayerNorm)
    layer = a_model(nn.SiLU())
    compute_rows_alone(layer)
    assert isinstance(layer.act_fn, RowsAlone)
    assert isinstance(layer.act_fn.activation, nn.SiLU)


def test_no_rows_give_no_rows() -> None:
    assert a_model(nn.GELU()).act_fn(torch.empty(0, SIZE)).shape == (0, SIZE)
