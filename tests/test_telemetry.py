"""The collectors alone; tests/api/test_metrics.py reads them over HTTP."""

from __future__ import annotations

import math

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.control.state import HeldBy
from server.telemetry import Telemetry
from server.types import TokenEdit


@pytest.fixture
def telemetry() -> Telemetry:
    telemetry = Telemetry()
    telemetry.bind("m", ["plain", "positive"])
    return telemetry


def edit(kl: float = 0.1, *, is_nonfinite: bool = False, **values: float) -> TokenEdit:
    return TokenEdit(values, values, kl, shift_ratio=0.2, held_by=HeldBy.MAX_KL, is_nonfinite=is_nonfinite)


def samples(telemetry: Telemetry) -> dict[tuple[str, str], float]:
    """(name without prefix, head) -> value."""
    return {
        (sample.name.removeprefix("recontrol_"), sample.labels.get("head", "")): sample.value
        for family in text_string_to_metric_families(telemetry.render().decode())
        for sample in family.samples
        if "le" not in sample.labels
    }


def test_every_sample_names_the_model(telemetry: Telemetry) -> None:
    telemetry.on_first_token(queue_s=0.1, prefill_s=0.2, ttft_s=0.3)
    families = text_string_to_metric_families(telemetry.render().decode())
    assert {sample.labels.get("model_name") for family in families for sample in family.samples} == {"m"}


def test_a_token_counts_once_for_each_of_its_heads(telemetry: Telemetry) -> None:
    telemetry.on_token(inter_token_s=None, edit=edit(plain=1.0, positive=2.0))
    telemetry.on_token(inter_token_s=0.01, edit=edit(plain=3.0))
    telemetry.on_token(inter_token_s=0.01, edit=None)
    got = samples(telemetry)
    assert (got["controlled_tokens_total", "plain"], got["controlled_tokens_total", "positive"]) == (2, 1)
    assert (got["value_before_count", "plain"], got["value_after_count", "positive"]) == (2, 1)
    assert got["generation_tokens_total", ""] == 3
    assert got["budget_limited_tokens_total", ""] == 2


def test_a_nonfinite_edit_is_counted_and_does_not_spoil_the_sums(telemetry: Telemetry) -> None:
    telemetry.on_token(inter_token_s=None, edit=edit(math.nan, is_nonfinite=True, plain=math.nan))
    telemetry.on_token(inter_token_s=None, edit=edit(0.25, plain=0.5))
    got = samples(telemetry)
    assert got["nonfinite_edits_total", ""] == 1
    assert got["controlled_tokens_total", "plain"] == 2
    # prometheus_client gives no sum where bounds are negative, so a value has its buckets and count.
    assert (got["edit_kl_sum", ""], got["value_before_count", "plain"]) == (0.25, 1)


def test_a_head_that_the_engine_does_not_have_makes_no_series(telemetry: Telemetry) -> None:
    telemetry.on_token(inter_token_s=None, edit=edit(stranger=1.0))
    assert b"stranger" not in telemetry.render()
