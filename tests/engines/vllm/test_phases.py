"""Control of a part of a response inside a vLLM worker, without vLLM: the worker sees what this program's side sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from server.control.params import ControlParams
from server.control.registry import HeadRegistry
from server.engines.base import NullObserver
from server.engines.segments import FORMATS
from server.engines.text import Detokenizer
from server.engines.vllm.outputs import VllmChoice
from server.engines.vllm.phases import PartsReader
from server.engines.vllm.row_control import Row, RowControl
from server.engines.vllm.wire import control_args
from server.types import GenerationRequest, Opening, SamplingParams
from tests.conftest import HIDDEN, byte_tokenizer, control
from tests.engines.vllm.test_row_control import Model, unembedding_of
from value_models.heads import ValueHead

TOKENIZER = byte_tokenizer()
REASONED: list[int] = TOKENIZER("<think>so</think>Hi there")["input_ids"]
BEGIN, END, SIZE = len("<think>"), len("<think>so</think>"), len("<think>so</think>Hi there")


def phased(phase: str, **options: Any) -> ControlParams:
    return control({"good": 1.0}, step_size=2.0, phase=phase, **options)


class Worker:
    """A row's control for one request, told its tokens a step later, as vLLM has them."""

    def __init__(self, heads: dict[str, ValueHead], params: ControlParams, opening: Opening | None) -> None:
        parts = PartsReader.of(TOKENIZER, "think")
        self.rows = RowControl(HeadRegistry(heads), unembedding_of(Model()), parts)
        self.args = control_args(params, "c", opening)
        self.rows.add("r", self.args, prompt_len=0)

    def step(self, position: int, token_id: int | None) -> list[float] | None:
        """The edit of the token of this place, if there is one; `token_id` is None for a step that gives no token."""
        hidden_BD = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(position))
        self.rows.logits(hidden_BD, [None, Row("r", position)])
        report = self.rows.take_report()
        assert report is not None
        assert not report.as_plain_data()["faults"]
        report.drawn = lambda: {} if token_id is None else {"r": token_id}
        return report.resolve().get("r")

    def run(self, tokens: list[int], first: int = 0) -> list[list[float] | None]:
        return [self.step(position, token) for position, token in enumerate(tokens, start=first)]


def where(edits: list[list[float] | None]) -> list[int]:
    return [place for place, edit in enumerate(edits) if edit is not None]


@pytest.mark.parametrize(
    ("phase", "opening", "expected"),
    [
        ("answer", Opening.EITHER, range(END, SIZE)),
        ("reasoning", Opening.EITHER, range(BEGIN, END)),
        ("answer", Opening.REASONING, range(END, SIZE)),
        ("reasoning", Opening.REASONING, range(END)),
        ("answer", Opening.ANSWER, range(SIZE)),
        ("reasoning", Opening.ANSWER, range(0)),
        ("both", None, range(SIZE)),
        ("answer", None, range(SIZE)),
    ],
)
def test_a_worker_edits_the_part_that_is_named_and_this_side_takes_its_edits(
    heads: dict[str, ValueHead], phase: str, opening: Opening | None, expected: range
) -> None:
    params = phased(phase)
    edits = Worker(heads, params, opening).run(REASONED)
    assert where(edits) == list(expected)
    parts = PartsReader.of(TOKENIZER, "think")
    assert parts is not None
    request = GenerationRequest("r", (65,), SamplingParams(max_tokens=SIZE), params, opening=opening)
    choice = VllmChoice.of(
        request, 0, detokenizer=Detokenizer(parts.vocabulary, (65,)), eos_token_ids=(), observer=NullObserver(),
        markup=parts.markup, choice_id="c",
    )  # fmt: skip
    # As they come in when this side is slow: all edits are there before the first token is taken.
    choice.edits.extend(edit for edit in edits if edit is not None)
    chunks = [choice.take(token_id) for token_id in REASONED]
    assert [place for place, chunk in enumerate(chunks) if chunk.edit is not None] == list(expected)
    assert not choice.edits


def test_rows_beside_and_tokens_of_the_other_part_are_vllms_own(heads: dict[str, ValueHead]) -> None:
    worker, model = Worker(heads, phased("answer"), Opening.REASONING), Model()
    for position, token_id in enumerate(REASONED):
        hidden_BD = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(position))
        logits_BV = worker.rows.logits(hidden_BD, [None, Row("r", position)])
        is_own = (logits_BV == model.compute_logits(hidden_BD).float()).all(dim=1).tolist()
        assert is_own == [True, position < END]
        report = worker.rows.take_report()
        assert report is not None
        report.drawn = lambda token_id=token_id: {"r": token_id}


@pytest.mark.parametrize(
    "more",
    [{}, {"max_response_kl": 0.6}, {"gate": {"head": "line", "below": 0.0, "hysteresis": 1.0}, "window": {"start": 2}}],
    ids=["plain", "budget", "conditions"],
)
def test_tokens_that_are_drawn_again_are_followed_anew(heads: dict[str, ValueHead], more: dict[str, Any]) -> None:
    params = phased("answer", **more)
    expected = Worker(heads, params, Opening.EITHER).run(REASONED)
    preempted = Worker(heads, params, Opening.EITHER)
    # The reasoning ends elsewhere in what is thrown away, and a step gives no token.
    preempted.run([*REASONED[: END - 3], *TOKENIZER("k>x")["input_ids"]])
    preempted.rows.add("r", preempted.args, prompt_len=0)
    preempted.step(BEGIN, None)
    assert preempted.run(REASONED[BEGIN:], first=BEGIN) == expected[BEGIN:]


def test_windows_and_budgets_count_from_the_first_token_on_which_control_acts(heads: dict[str, ValueHead]) -> None:
    worker = Worker(heads, phased("answer", window={"start": 3}, max_response_kl=0.4), Opening.EITHER)
    kls = [edit[-5] for edit in worker.run(REASONED) if edit is not None]
    assert kls[:3] == [0.0] * 3
    assert 0.2 < sum(kls[3:]) <= 0.4


def test_a_token_that_nobody_has_told_ends_its_request_and_no_other(heads: dict[str, ValueHead]) -> None:
    worker = Worker(heads, phased("answer"), Opening.EITHER)
    worker.rows.add("s", control_args(control({"good": 1.0}), "d"), prompt_len=0)
    worker.rows.logits(torch.randn(2, HIDDEN), [Row("s", 7), Row("r", 7)])
    report = worker.rows.take_report()
    assert report is not None
    data = report.as_plain_data()
    assert (list(data["faults"]), list(data["edits"])) == (["r"], ["s"])


def test_a_model_that_marks_nothing_is_all_answer() -> None:
    assert PartsReader.of(TOKENIZER, "auto") is None
    assert PartsReader.of(TOKENIZER, "none") is None
    found = PartsReader.of(TOKENIZER, "think")
    assert found is not None
    assert found.markup.spans == list(FORMATS["think"].spans)
