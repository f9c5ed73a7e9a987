"""Targets and floors in reward inside vLLM: this program's own server has made them levels of the value, and for
requests of vLLM's own server the workers do, by the cards that they have read."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from server.control.levels import in_values
from server.control.params import ControlParams
from server.control.registry import HeadRegistry
from server.engines.vllm.delivery import Delivery
from server.engines.vllm.row_control import RowControl
from server.engines.vllm.wire import CONTROL_KEY, REPORT_KEY, control_args
from server.errors import InvalidRequestError
from tests.conftest import HIDDEN, card_of, write_heads
from tests.engines.conftest import calibrated_card
from tests.engines.vllm.test_row_control import Model, states, unembedding_of
from tests.engines.vllm.test_sides import output
from value_models.heads import ValueHead
from value_models.store import save_head

TARGET = {"type": "target", "values": {"good": 0.5}}
FLOOR = {"type": "floor", "floors": {"good": 0.9}, "weights": {"line": -1.0}}


@pytest.fixture
def row_control(heads: dict[str, ValueHead]) -> RowControl:
    """`good` is calibrated, `line` is not."""
    cards = {"good": calibrated_card("good", heads["good"]), "line": card_of("line", heads["line"])}
    return RowControl(HeadRegistry(heads, cards), unembedding_of(Model()))


def asked(objective: dict[str, Any]) -> dict[str, Any]:
    return {"objective": objective, "step_size": 2.0}


def params(objective: dict[str, Any]) -> ControlParams:
    return ControlParams.model_validate(asked(objective))


def of_vllms_server(objective: dict[str, Any]) -> dict[str, Any]:
    return {CONTROL_KEY: json.dumps(asked(objective))}


def report_of(row_control: RowControl, extra_args: dict[str, Any]) -> dict[str, Any]:
    """Of a request's first token."""
    row_control.remove("r")
    row_control.add("r", extra_args, prompt_len=1)
    row_control.logits(states(1), [row_control.row("r", 1)])
    report = row_control.take_report()
    assert report is not None
    return report.as_plain_data()


@pytest.mark.parametrize("objective", [TARGET, FLOOR], ids=["target", "floor"])
def test_a_reward_that_vllms_own_server_is_asked_for_becomes_the_level_that_gives_it(
    row_control: RowControl, objective: dict[str, Any]
) -> None:
    level = in_values(params(objective), row_control.registry.calibrations()).objective
    report = report_of(row_control, of_vllms_server(objective))
    expected = report_of(row_control, of_vllms_server(level.model_dump(exclude_none=True)))
    as_value = report_of(row_control, of_vllms_server({**objective, "unit": "value"}))
    assert report["edits"] == expected["edits"]
    assert report["edits"] != as_value["edits"]
    assert "warnings" not in report


def test_what_this_programs_own_server_has_made_a_level_is_not_made_one_again(row_control: RowControl) -> None:
    once = in_values(params(TARGET), row_control.registry.calibrations())
    mine = report_of(row_control, control_args(once, "choice"))
    assert mine["edits"] == report_of(row_control, of_vllms_server(TARGET))["edits"]


def test_a_reward_out_of_reach_ends_its_request_and_says_what_is_allowed(row_control: RowControl) -> None:
    report = report_of(row_control, of_vllms_server({"type": "target", "values": {"good": 1.5}}))
    assert report["edits"] == {}
    assert "control.objective.values.good: control was not seen to reach" in report["faults"]["r"]
    assert "0 to 1, or a level of the value" in report["faults"]["r"]


def test_a_summary_of_vllms_own_server_tells_of_a_head_that_is_uncalibrated(row_control: RowControl) -> None:
    args = of_vllms_server({"type": "target", "values": {"line": 0.5}})
    delivery, last = Delivery(), output(finish_reason="stop")
    delivery.expect("r", args)
    delivery.fill(last, report_of(row_control, args))
    (warning,) = last.kv_transfer_params[REPORT_KEY]["control"]["warnings"]
    assert "'line' is uncalibrated" in warning
    delivery.expect("r", of_vllms_server(TARGET))
    delivery.fill(again := output(finish_reason="stop"), report_of(row_control, of_vllms_server(TARGET)))
    assert "warnings" not in again.kv_transfer_params[REPORT_KEY]["control"]


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("objective", "told"),
    [
        ({"type": "target", "values": {"good": 1.5}}, "objective.values.good: .* allowed are 0 to 1, or"),
        ({**FLOOR, "floors": {"good": 1.5}}, "objective.floors.good: .* allowed are at most 1, or"),
        ({"type": "target", "values": {"line": 0.5}, "unit": "reward"}, "objective.unit: the head 'line' is uncalib"),
        (TARGET, None),
        (FLOOR, None),
        ({"type": "target", "values": {"good": 1.5}, "unit": "value"}, None),
    ],
    ids=["target", "floor", "unit", "target-in-reach", "floor-in-reach", "value"],
)
def test_vllms_own_server_refuses_what_cannot_be_had_before_it_queues(
    heads: dict[str, ValueHead], tmp_path: Path, objective: dict[str, Any], told: str | None
) -> None:
    from server.engines.vllm.validation import check_plain

    save_head(tmp_path / "good", heads["good"], calibrated_card("good", heads["good"]))
    write_heads(tmp_path, {"line": heads["line"]}, {"name": "tiny", "hidden_size": HIDDEN})
    with contextlib.nullcontext() if told is None else pytest.raises(InvalidRequestError, match=told):
        check_plain(of_vllms_server(objective), tmp_path)


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
def test_vllms_own_server_says_which_card_cannot_be_read(heads: dict[str, ValueHead], tmp_path: Path) -> None:
    from server.engines.vllm.validation import check_plain

    save_head(tmp_path / "good", heads["good"], calibrated_card("good", heads["good"]))
    (tmp_path / "good" / "card.json").write_text("{")
    with pytest.raises(InvalidRequestError, match=r"recontrol: .*good/card\.json"):
        check_plain(of_vllms_server(TARGET), tmp_path)
