"""The adapters for vLLM's model runners, on runners that do what vLLM's do with rows and nothing else.

tests/engines/vllm/test_signatures.py holds these fakes to the real ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from server.control.params import ControlParams
from server.control.registry import HeadRegistry
from server.engines.segments import Markup, OutputFormat
from server.engines.vllm.phases import PartsReader
from server.engines.vllm.row_control import RowControl
from server.engines.vllm.runners import adapter_for
from server.engines.vllm.wire import REPORT_KEY, control_args
from server.engines.vocabulary import Vocabulary
from server.types import Opening
from tests.conftest import HIDDEN, VOCAB, byte_tokenizer, control
from tests.engines.vllm.test_row_control import Model, unembedding_of
from value_models.heads import ValueHead

GOOD = control({"good": 1.0}, step_size=2.0)
TOKEN = 70
"""What every request draws."""
BUDGETED = control({"good": 1.0}, step_size=2.0, max_response_kl=0.5)
Asked = tuple[str, int, ControlParams | None]
"""Name, length of the prompt, control."""


@dataclass
class NewRequest:
    """As vLLM's NewRequestData."""

    req_id: str
    prompt_len: int
    sampling_params: Any
    num_computed_tokens: int = 0
    prefill_len: int = 0


@dataclass
class Schedule:
    """As vLLM's SchedulerOutput."""

    num_scheduled_tokens: dict[str, int]
    scheduled_new_reqs: list[NewRequest] = field(default_factory=list)
    finished_req_ids: set[str] = field(default_factory=set)
    preempted_req_ids: set[str] = field(default_factory=set)
    resumed: dict[str, int] = field(default_factory=dict)
    """Prompt and output of requests that Runner V1 is told to compute anew."""


def new(asked: Asked, *, num_output: int = 0) -> NewRequest:
    name, prompt_len, params = asked
    extra_args = None if params is None else control_args(params, f"choice of {name}")
    return NewRequest(name, prompt_len, SimpleNamespace(extra_args=extra_args), prefill_len=prompt_len + num_output)


class _Runner:
    """Hidden states lie in a buffer that outlives the step, as a CUDA graph's do, keyed by request and place."""

    def __init__(self) -> None:
        self.model = Model()
        self.buffer_TD = torch.zeros(64, HIDDEN)
        self.sampled: dict[str, Tensor] = {}
        """Request -> the logits that its token was drawn from."""
        self.prompt_logits: list[Tensor] = []

    def state(self, name: str, position: int) -> Tensor:
        seed = sum(name.encode()) * 1000 + position
        return torch.randn(HIDDEN, generator=torch.Generator().manual_seed(seed))

    def plain(self, name: str, position: int) -> Tensor:
        return self.model.linear(self.state(name, position))[:VOCAB]

    def profile_run(self) -> Tensor:
        return self.model.compute_logits(torch.ones(3, HIDDEN))

    def _forward(self, rows: list[tuple[str, int]]) -> Tensor:
        for index, (name, position) in enumerate(rows):
            self.buffer_TD[index] = self.state(name, position)
        return self.buffer_TD[: len(rows)]


class RunnerV1(_Runner):
    """Rows are what `input_batch.req_ids` says; requests are remembered over preemption."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: dict[str, Any] = {}
        self.input_batch: Any = None
        self.discard_request_mask = SimpleNamespace(np=np.zeros(8, dtype=bool))

    def execute_model(self, scheduler_output: Schedule, intermediate_tensors: Any = None) -> None:
        for name in scheduler_output.finished_req_ids:
            self.requests.pop(name, None)
        for request in scheduler_output.scheduled_new_reqs:
            self.requests[request.req_id] = SimpleNamespace(computed=0, length=request.prompt_len)
        for name in scheduler_output.resumed:
            self.requests[name].computed = 0
        # vLLM fills the holes that finished requests leave, so the order is not that of arrival.
        names = sorted(scheduler_output.num_scheduled_tokens, reverse=True)
        computed = np.array([self.requests[name].computed for name in names])
        self.input_batch = SimpleNamespace(req_ids=names, num_computed_tokens_cpu=computed)
        known = [self.requests[n].computed + scheduler_output.num_scheduled_tokens[n] for n in names]
        self.discard_request_mask.np[: len(names)] = [
            k < self.requests[n].length for k, n in zip(known, names, strict=True)
        ]
        hidden_BD = self._forward([(name, k) for name, k in zip(names, known, strict=True)])
        self._logits = self.model.compute_logits(hidden_BD[torch.arange(len(names))])
        for name, k in zip(names, known, strict=True):
            self.requests[name].computed = k

    def sample_tokens(self, grammar_output: Any) -> Any:
        names = self.input_batch.req_ids
        for index, name in enumerate(names):
            if not self.discard_request_mask.np[index]:
                self.sampled[name] = self._logits[index]
                self.requests[name].length += 1
        self.prompt_logits.append(self.model.compute_logits(self.buffer_TD[:2]))
        discarded = self.discard_request_mask.np[: len(names)]
        return SimpleNamespace(req_ids=names, sampled_token_ids=[[] if none else [TOKEN] for none in discarded])


class RunnerV2(_Runner):
    """Requests live in slots that are used again; a step's rows map to them through `idx_mapping`."""

    def __init__(self) -> None:
        super().__init__()
        self.slots: dict[str, int] = {}
        self.free = [3, 2, 1, 0]
        self.computed, self.prefill_len = np.zeros(4, dtype=int), np.zeros(4, dtype=int)

    def execute_model(self, scheduler_output: Schedule, intermediate_tensors: Any = None) -> None:
        self.finish_requests(scheduler_output)
        self.add_requests(scheduler_output)
        names = sorted(scheduler_output.num_scheduled_tokens, key=scheduler_output.num_scheduled_tokens.__getitem__)
        slots = np.array([self.slots[name] for name in names])
        self._batch = SimpleNamespace(
            req_ids=names,
            idx_mapping_np=slots,
            num_scheduled_tokens=np.array([scheduler_output.num_scheduled_tokens[name] for name in names]),
            num_computed_tokens_np=self.computed[slots],
            prefill_len_np=self.prefill_len[slots],
            logits_indices=torch.arange(len(names)),
        )
        known = self._batch.num_computed_tokens_np + self._batch.num_scheduled_tokens
        self._hidden = self._forward([(name, int(k)) for name, k in zip(names, known, strict=True)])
        self.computed[slots] = known

    def finish_requests(self, scheduler_output: Schedule) -> None:
        for name in sorted(scheduler_output.finished_req_ids | scheduler_output.preempted_req_ids):
            if name in self.slots:
                self.free.append(self.slots.pop(name))

    def add_requests(self, scheduler_output: Schedule) -> None:
        for request in scheduler_output.scheduled_new_reqs:
            slot = self.slots[request.req_id] = self.free.pop()
            self.computed[slot], self.prefill_len[slot] = request.num_computed_tokens, request.prefill_len

    def sample(self, hidden_states: Tensor, input_batch: Any, grammar_output: Any) -> Any:
        logits = self.model.compute_logits(hidden_states[input_batch.logits_indices])
        known = input_batch.num_computed_tokens_np + input_batch.num_scheduled_tokens
        for index, name in enumerate(input_batch.req_ids):
            if known[index] >= input_batch.prefill_len_np[index]:
                self.sampled[name] = logits[index]
        return logits

    def sample_tokens(self, grammar_output: Any) -> Any:
        self.sample(self._hidden, self._batch, grammar_output)
        # Given as a function, as vLLM gives it.
        compute_logits = self.model.compute_logits
        self.prompt_logits.append(compute_logits(self._hidden[:2]))
        known = self._batch.num_computed_tokens_np + self._batch.num_scheduled_tokens
        tokens = [[TOKEN] if k >= length else [] for k, length in zip(known, self._batch.prefill_len_np, strict=True)]
        outputs = iter([SimpleNamespace(req_ids=self._batch.req_ids, sampled_token_ids=tokens)])
        # It may be asked for once.
        return SimpleNamespace(get_output=lambda: next(outputs))


class Driver:
    """A runner under control, told what to do by a schedule a step."""

    def __init__(self, kind: type[_Runner], heads: dict[str, ValueHead], parts: PartsReader | None = None) -> None:
        self.runner: Any = kind()
        self.runner.__class__ = adapter_for(self.runner, is_v2=kind is RunnerV2)
        row_control = RowControl(HeadRegistry(heads), unembedding_of(self.runner.model), parts)
        self.runner.install_control(row_control, self.runner.model)

    def step(self, scheduled: dict[str, int], **options: Any) -> dict[str, Any]:
        """The step's report, or none at all; `runner.sampled` then has the step's logits and no others."""
        self.runner.sampled.clear()
        self.runner.execute_model(Schedule(scheduled, **options))
        output = self.runner.sample_tokens(None)
        output = output.get_output() if hasattr(output, "get_output") else output
        return getattr(output, REPORT_KEY, {"edits": {}})

    def moved(self, name: str, position: int) -> bool:
        """Whether the row's logits are others than without control."""
        plain = self.runner.plain(name, position)
        return not torch.allclose(self.runner.sampled[name], plain, atol=1e-3)


@pytest.fixture(params=[RunnerV1, RunnerV2])
def driver(request: pytest.FixtureRequest, heads: dict[str, ValueHead]) -> Driver:
    return Driver(request.param, heads)


A, B, C = ("a", 4, GOOD), ("b", 6, None), ("c", 2, GOOD)


def test_rows_are_edited_by_request_whatever_the_batchs_order(driver: Driver) -> None:
    report = driver.step({"a": 4, "b": 6, "c": 2}, scheduled_new_reqs=[new(A), new(B), new(C)])
    assert {name: driver.moved(name, position) for name, position in (("a", 4), ("b", 6), ("c", 2))} == {
        "a": True, "b": False, "c": True
    }  # fmt: skip
    assert sorted(report["edits"]) == ["a", "c"]
    driver.step({"c": 1, "b": 1}, finished_req_ids={"a"})
    assert (driver.moved("c", 3), driver.moved("b", 7)) == (True, False)


def test_a_chunk_of_a_prompt_that_gives_no_token_is_not_edited_or_reported(driver: Driver) -> None:
    report = driver.step({"a": 3, "c": 2}, scheduled_new_reqs=[new(A), new(C)])
    assert list(report["edits"]) == ["c"]
    report = driver.step({"a": 1, "c": 1})
    assert sorted(report["edits"]) == ["a", "c"]
    assert driver.moved("a", 4)


def test_log_probabilities_of_prompts_and_profiling_stay_unedited(driver: Driver) -> None:
    plain = driver.runner.model.linear(torch.ones(3, HIDDEN))[:, :VOCAB]
    driver.step({"a": 4, "c": 2}, scheduled_new_reqs=[new(A), new(C)])
    states_BD = driver.runner.buffer_TD[:2]
    assert driver.runner.prompt_logits[-1].equal(driver.runner.model.linear(states_BD)[:, :VOCAB])
    assert driver.runner.profile_run().equal(plain)


def test_the_buffer_that_states_come_in_is_left_as_it_was(driver: Driver) -> None:
    driver.step({"a": 4}, scheduled_new_reqs=[new(A)])
    assert driver.runner.buffer_TD[0].equal(driver.runner.state("a", 4))


def test_a_slot_that_is_used_again_has_nothing_left_of_who_had_it(driver: Driver) -> None:
    driver.step({"a": 4}, scheduled_new_reqs=[new(A)])
    report = driver.step({"b": 6}, scheduled_new_reqs=[new(B)], finished_req_ids={"a"})
    assert report["edits"] == {}
    assert not driver.moved("b", 6)
    # The same id again, in the step that its first bearer goes in, now without control.
    driver.step({"c": 2}, scheduled_new_reqs=[new(C)], finished_req_ids={"b"})
    again = ("c", 3, None)
    report = driver.step({"c": 3}, scheduled_new_reqs=[new(again)], finished_req_ids={"c"})
    assert report["edits"] == {}


def test_a_preempted_request_comes_back_with_what_it_had_spent(heads: dict[str, ValueHead]) -> None:
    asked = ("a", 4, BUDGETED)
    spent: list[float] = []
    for kind in (RunnerV1, RunnerV2):
        driver = Driver(kind, heads)

        def step(scheduled: dict[str, int], driver: Driver = driver, **options: Any) -> float:
            (numbers,) = driver.step(scheduled, **options)["edits"].values()
            return numbers[2]

        kls = [step({"a": 4}, scheduled_new_reqs=[new(asked)])]
        kls += [step({"a": 1}) for _ in range(3)]
        # A step without it, then all of it is computed anew at once.
        driver.step({"b": 6}, scheduled_new_reqs=[new(B)], preempted_req_ids={"a"})
        came_back = {"resumed": {"a": 8}} if kind is RunnerV1 else {"scheduled_new_reqs": [new(asked, num_output=4)]}
        kls.append(step({"a": 8, "b": 1}, **came_back))
        kls += [step({"a": 1, "b": 1}) for _ in range(3)]
        assert 0.4 < sum(kls) <= 0.5
        spent.append(sum(kls))
    assert spent[0] == pytest.approx(spent[1], rel=1e-5)


@pytest.mark.parametrize("kind", [RunnerV1, RunnerV2])
def test_a_steps_tokens_are_known_to_the_next_before_vllm_asks_for_them(
    heads: dict[str, ValueHead], kind: type[_Runner]
) -> None:
    # What every request of these runners draws ends its reasoning.
    marks = OutputFormat.reasoning("tiny", ("<",), (str(byte_tokenizer().decode([TOKEN])),))
    vocabulary = Vocabulary(byte_tokenizer().backend_tokenizer)
    driver = Driver(kind, heads, PartsReader(Markup(marks, vocabulary), vocabulary))
    params = control({"good": 1.0}, step_size=2.0, phase="answer")
    asked = new(("a", 4, params))
    asked.sampling_params.extra_args = control_args(params, "c", Opening.REASONING)
    outputs, is_moved = [], []
    for scheduled, length in ((3, 3), (1, 4), (1, 5), (1, 6)):
        driver.runner.sampled.clear()
        driver.runner.execute_model(Schedule({"a": scheduled}, scheduled_new_reqs=[] if outputs else [asked]))
        outputs.append(driver.runner.sample_tokens(None))
        is_moved.append("a" in driver.runner.sampled and driver.moved("a", length))
    assert is_moved == [False, False, True, True]
    told = [output.get_output() if hasattr(output, "get_output") else output for output in outputs]
    assert [bool(getattr(output, REPORT_KEY, {"edits": {}})["edits"]) for output in told] == is_moved


def test_a_step_without_controlled_rows_is_vllms_own(driver: Driver) -> None:
    report = driver.step({"b": 6}, scheduled_new_reqs=[new(B)])
    assert report["edits"] == {}
    assert driver.runner.sampled["b"].equal(driver.runner.model.linear(driver.runner.buffer_TD[:1])[0, :VOCAB])
