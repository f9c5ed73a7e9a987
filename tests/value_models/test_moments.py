"""Sums over blocks: they are those of the definition, however the blocks were cut and wherever they were added."""

from __future__ import annotations

import pytest
import torch

from value_models.moments import MomentSums, ProductGramSum

SIZE = 5


@pytest.fixture
def states_ND() -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(60, SIZE, generator=rng) @ torch.randn(SIZE, SIZE, generator=rng) + 7.0


@pytest.fixture
def target_N() -> torch.Tensor:
    return torch.randn(60, generator=torch.Generator().manual_seed(1))


def sums_of(states_ND: torch.Tensor, target_N: torch.Tensor, weight: float = 1.0) -> MomentSums:
    sums = MomentSums()
    sums.add(states_ND, target_N, weight)
    return sums


def test_sums_that_were_added_apart_are_those_of_all_whatever_their_pivots(
    states_ND: torch.Tensor, target_N: torch.Tensor
) -> None:
    together = MomentSums()
    together.add(states_ND[:20], target_N[:20])
    together.add(states_ND[20:], target_N[20:], 3.0)
    apart = sums_of(states_ND[:20], target_N[:20])
    apart.add_sums(sums_of(states_ND[20:], target_N[20:]), 3.0)
    expected, found = together.moments(), apart.moments()
    for name in ("mean_D", "scale_D", "correlation_DD", "product_D", "target_mean", "target_variance"):
        torch.testing.assert_close(
            torch.as_tensor(getattr(found, name)), torch.as_tensor(getattr(expected, name)), rtol=1e-5, atol=1e-6
        )


def test_the_first_columns_have_the_moments_that_they_have_alone(
    states_ND: torch.Tensor, target_N: torch.Tensor
) -> None:
    found, expected = sums_of(states_ND, target_N).first(3).moments(), sums_of(states_ND[:, :3], target_N).moments()
    torch.testing.assert_close(found.correlation_DD, expected.correlation_DD)
    torch.testing.assert_close(found.product_D, expected.product_D)
    torch.testing.assert_close(found.mean_D, expected.mean_D)


def test_sums_tell_whether_what_was_added_is_finite(states_ND: torch.Tensor, target_N: torch.Tensor) -> None:
    sums = sums_of(states_ND, target_N)
    assert sums.is_finite()
    states_ND[3, 2] = float("inf")
    sums.add(states_ND, target_N)
    assert not sums.is_finite()


def test_products_of_features_with_rows_are_added_up_as_written(states_ND: torch.Tensor) -> None:
    features_NW = torch.randn(60, 3, generator=torch.Generator().manual_seed(2))
    sums = ProductGramSum(3, SIZE, torch.device("cpu"))
    for some in (slice(0, 25), slice(25, 60)):
        sums.add(features_NW[some], states_ND[some])
    z_NF = (features_NW[:, :, None] * states_ND[:, None]).flatten(1).double()
    torch.testing.assert_close(sums.matrix(3), z_NF.T @ z_NF, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(sums.matrix(1), (z_NF.T @ z_NF)[:SIZE, :SIZE], rtol=1e-5, atol=1e-3)
