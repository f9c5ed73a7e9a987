"""One adapter for each of vLLM's model runners: which rows of a step get a token, and for which of it they are edited.

An adapter is mixed into the runner that vLLM has made. It hears of requests that come and go, and arms the model's
`compute_logits` for exactly the call that tokens are drawn from; profiling, warm-up and log-probabilities of prompts
call it unarmed and stay as they are. All of it lies outside torch.compile and CUDA graphs. What these classes use of
vLLM is written down in tests/engines/vllm/test_signatures.py. Imports no vLLM. Enter at `adapter_for`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from server.engines.vllm.row_control import Row, RowControl, StepReport
from server.engines.vllm.wire import REPORT_KEY

Rows = list[Row | None]


class _ControlledRunner:
    row_control: RowControl | None = None
    _rows_to_edit: Callable[[], Rows] | None = None
    """Armed: the rows that the next call of `compute_logits` is for."""

    def install_control(self, control: RowControl, model: Any) -> None:
        """Put control in front of the loaded model's `compute_logits`."""
        plain = model.compute_logits

        def compute_logits(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
            rows_of, self._rows_to_edit = self._rows_to_edit, None
            rows = [] if rows_of is None or control.is_idle else rows_of()
            if not any(rows):
                return plain(hidden_states, *args, **kwargs)
            return control.logits(hidden_states, rows)

        model.compute_logits = compute_logits
        self.row_control = control

    @contextlib.contextmanager
    def _armed(self, rows_of: Callable[[], Rows]) -> Iterator[None]:
        self._rows_to_edit = rows_of if self.row_control is not None else None
        try:
            yield
        finally:
            self._rows_to_edit = None

    def _hear_of_finished(self, scheduler_output: Any) -> None:
        if self.row_control is not None:
            for request_id in scheduler_output.finished_req_ids:
                self.row_control.remove(request_id)

    def _hear_of_new(self, scheduler_output: Any) -> None:
        if self.row_control is not None:
            for new in scheduler_output.scheduled_new_reqs:
                extra_args = None if new.sampling_params is None else new.sampling_params.extra_args
                self.row_control.add(new.req_id, extra_args, prompt_len=new.prompt_len)

    def _with_report(self, output: Any) -> Any:
        """The step's output, or what will become it, with what the edits did."""
        report = None if self.row_control is None else self.row_control.take_report()
        if report is None or output is None:
            return output
        if hasattr(output, "get_output"):
            # It is vLLM's to ask for once; control may have to know the tokens before vLLM asks.
            whole = _Once(output.get_output)
            output.get_output = lambda: _attach(whole(), report)
            report.drawn = lambda: _tokens(whole())
            return output
        report.drawn = lambda: _tokens(output)
        return _attach(output, report)


class ControlledRunnerV1(_ControlledRunner):
    """For vllm/v1/worker/gpu_model_runner.py, whose batch keeps its rows in `input_batch`."""

    input_batch: Any
    discard_request_mask: Any

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        self._hear_of_finished(scheduler_output)
        self._hear_of_new(scheduler_output)
        with self._armed(lambda: self._sampled_rows(scheduler_output)):
            return super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        return self._with_report(super().sample_tokens(*args, **kwargs))  # type: ignore[misc]

    def _sampled_rows(self, scheduler_output: Any) -> Rows:
        assert self.row_control is not None
        names, scheduled = self.input_batch.req_ids, scheduler_output.num_scheduled_tokens
        # As lists: numpy's numbers are slow to come by one at a time.
        computed = self.input_batch.num_computed_tokens_cpu[: len(names)].tolist()
        is_discarded = self.discard_request_mask.np[: len(names)].tolist()
        return [
            None if without_token else self.row_control.row(name, known + scheduled[name])
            for name, known, without_token in zip(names, computed, is_discarded, strict=True)
        ]


class ControlledRunnerV2(_ControlledRunner):
    """For vllm/v1/worker/gpu/model_runner.py, where a step's batch is an object of its own."""

    def finish_requests(self, scheduler_output: Any) -> None:
        super().finish_requests(scheduler_output)  # type: ignore[misc]
        # Those preempted leave their slots too, but come back.
        self._hear_of_finished(scheduler_output)

    def add_requests(self, scheduler_output: Any) -> None:
        super().add_requests(scheduler_output)  # type: ignore[misc]
        self._hear_of_new(scheduler_output)

    def sample(self, hidden_states: Tensor, input_batch: Any, grammar_output: Any) -> Any:
        with self._armed(lambda: self._sampled_rows(input_batch)):
            return super().sample(hidden_states, input_batch, grammar_output)  # type: ignore[misc]

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        return self._with_report(super().sample_tokens(*args, **kwargs))  # type: ignore[misc]

    def _sampled_rows(self, input_batch: Any) -> Rows:
        assert self.row_control is not None
        known = input_batch.num_computed_tokens_np + input_batch.num_scheduled_tokens
        is_sampled = known >= input_batch.prefill_len_np
        return [
            self.row_control.row(name, num_tokens) if gets_token else None
            for name, num_tokens, gets_token in zip(
                input_batch.req_ids, known.tolist(), is_sampled.tolist(), strict=False
            )
        ]


def adapter_for(runner: Any, *, is_v2: bool) -> type:
    """A class for this runner, made of its own one and an adapter; `runner.__class__` is to become it."""
    own = type(runner)
    adapter = ControlledRunnerV2 if is_v2 else ControlledRunnerV1
    return type(f"Controlled{own.__name__}", (adapter, own), {})


class _Once:
    """What is asked for once, from whatever thread, and then kept."""

    def __init__(self, get: Callable[[], Any]) -> None:
        self._get: Callable[[], Any] | None = get
        self._got: Any = None
        self._lock = threading.Lock()

    def __call__(self) -> Any:
        with self._lock:
            if self._get is not None:
                self._got, self._get = self._get(), None
            return self._got


def _tokens(output: Any) -> dict[str, int]:
    """Request id -> the token that it got, if it got one."""
    pairs = zip(output.req_ids, output.sampled_token_ids, strict=False)
    return {name: token_ids[-1] for name, token_ids in pairs if token_ids}


def _attach(output: Any, report: StepReport) -> Any:
    setattr(output, REPORT_KEY, report.as_plain_data())
    return output
