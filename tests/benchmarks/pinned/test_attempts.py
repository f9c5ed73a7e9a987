"""The study of pinned control tries every field whose effect is a matter of measurement."""

from benchmarks.pinned.attempts import ATTEMPTS
from benchmarks.pinned.report import table
from tests.api.test_pinned_fields import COMPOSED, NOT_HELD, OUTWEIGHS, REDRAWN


def test_every_field_that_no_law_settles_is_tried() -> None:
    tried = {name for attempt in ATTEMPTS for name in attempt.body} | {"logit_bias"}
    assert REDRAWN.keys() | OUTWEIGHS.keys() <= tried | {"seed"}
    assert tried & NOT_HELD.keys()
    control = {name for attempt in ATTEMPTS for name in attempt.body.get("control", {})}
    # A bound only ends a text, in one way or another, and a trace only tells of it.
    assert COMPOSED.keys() <= control | {"stop_below", "on_stop", "trace"}


def test_what_is_refused_by_default_is_measured_as_such() -> None:
    refused = {name for attempt in ATTEMPTS if attempt.kind == "refused" for name in attempt.body} | {"logit_bias"}
    assert refused == OUTWEIGHS.keys()


def test_a_fall_is_a_change_whose_interval_is_below_zero() -> None:
    scores = {"value": 0.1, "reward": 0.2}
    rows = [
        {
            "field": "a",
            "kind": "held",
            "against": "alone",
            **scores,
            "change": {"mean": -0.1, "low": -0.2, "high": high},
        }
        for high in (-0.01, 0.01)
    ]
    result = {"without": scores, "alone": scores, "attempts": rows, "num_prompts": 2, "max_tokens": 3, "seed": 0,
              "command": "c", "system": {"cpu": "x", "date": "2026-01-01T"}}  # fmt: skip
    assert [line.split(" | ")[-1] for line in table(result).splitlines() if line.startswith("| a ")] == [
        "yes |",
        "no |",
    ]
