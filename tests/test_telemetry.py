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


def sizes(telemetry: Telemetry, when: str, head: str) -> dict[str, tuple[float, float]]:
    """Sign -> count and sum of a value's sizes."""
    families = text_string_to_metric_families(telemetry.render().decode())
    (family,) = [family for family in families if family.name == f"recontrol_value_{when}_magnitude"]
    found = {(s.labels["sign"], s.name.rsplit("_", 1)[1]): s.value for s in family.samples if s.labels["head"] == head}
    return {sign: (found[sign, "count"], found[sign, "sum"]) for sign, _ in found}


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
    assert got["budget_limited_tokens_total", ""] == 2


def test_a_nonfinite_edit_is_counted_and_does_not_spoil_the_sums(telemetry: Telemetry) -> None:
    telemetry.on_token(inter_token_s=None, edit=edit(math.nan, is_nonfinite=True, plain=math.nan))
    telemetry.on_token(inter_token_s=None, edit=edit(0.25, plain=0.5))
    got = samples(telemetry)
    assert got["nonfinite_edits_total", ""] == 1
    assert got["controlled_tokens_total", "plain"] == 2
    assert (got["edit_kl_sum", ""], got["value_before_count", "plain"]) == (0.25, 1)
    assert sizes(telemetry, "before", "plain") == {"positive": (1, 0.5), "negative": (0, 0)}


def test_the_sums_of_a_value_grow_by_sign_so_that_its_mean_can_be_told(telemetry: Telemetry) -> None:
    values = [-1.5, 0.25, 2.0, -0.5, 0.0]
    seen: list[float] = []
    for value in values:
        telemetry.on_token(inter_token_s=None, edit=edit(plain=value))
        seen.append(sum(total for _, total in sizes(telemetry, "after", "plain").values()))
    assert seen == sorted(seen)
    after = sizes(telemetry, "after", "plain")
    assert after == {"positive": (3, 2.25), "negative": (2, 2.0)}
    (plus, above), (minus, below) = after["positive"], after["negative"]
    assert (above - below) / (plus + minus) == sum(values) / len(values)
    assert samples(telemetry)["value_after_count", "plain"] == len(values)
    assert sizes(telemetry, "before", "positive") == {"positive": (0, 0), "negative": (0, 0)}


def test_a_head_that_the_engine_does_not_have_makes_no_series(telemetry: Telemetry) -> None:
    telemetry.on_token(inter_token_s=None, edit=edit(stranger=1.0))
    assert b"stranger" not in telemetry.render()
