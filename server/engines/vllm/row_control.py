"""Control inside a vLLM worker: which requests are controlled, and a step's plan, edit and report.

Everything is kept by request id, never by place in the batch: vLLM moves rows, recycles slots, and lets a preempted
request come back as a new one. What gate and response budget remember is kept for every number of tokens, so tokens
that vLLM throws away and draws again are no trouble. Knows no vLLM. Enter at `RowControl.logits`.

Shapes: B rows of a step, R rows of a group, K heads, D hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from server.control.budget import ROUNDING_NATS
from server.control.editor import StateEditor
from server.control.group_edit import GroupStats
from server.control.levels import UNCALIBRATED, in_values, uncalibrated
from server.control.params import ControlParams, check_units
from server.control.plan import EditPlan, are_same
from server.control.registry import HeadRegistry
from server.control.state import ControlState, EditFigures, Segment
from server.engines.vllm.phases import FollowedParts, PartsReader
from server.engines.vllm.unembedding import VllmUnembedding
from server.engines.vllm.wire import ID_KEY, parse_control, parse_opening
from server.errors import InvalidRequestError, UnknownHeadError

_log = logging.getLogger(__name__)
_FAILED = "control failed inside the worker"


class Row(NamedTuple):
    """A row that gets a token now. `position` is the token's place in the output, from 0."""

    request_id: str
    position: int


@dataclass(slots=True)
class _Request:
    control: ControlParams | None
    prompt_len: int
    fault: str | None = None
    """Why it cannot be controlled; it ends with an error then."""
    warnings: Sequence[str] = ()
    """What its sender must know of its heads, where this program's own server does not tell it."""
    parts: FollowedParts | None = None
    """Of a response of which control acts on a part."""
    states: list[ControlState] = field(default_factory=lambda: [ControlState()])
    """What control has to know before each token on which it acts, for those that have to know anything."""

    @property
    def remembers(self) -> bool:
        control = self.control
        return control is not None and (control.gate is not None or control.max_response_kl is not None)

    def acting(self, position: int) -> ControlParams | None:
        """The control of the token of this place, if any acts on it."""
        control = self.control
        if control is None or control.phase == "both":
            return control
        acts = control.acts_on(Segment.ANSWER) if self.parts is None else self.parts.is_controlled(control, position)
        return control if acts else None

    def count_at(self, position: int) -> int:
        """Tokens before this place on which control acts."""
        return position if self.parts is None else self.parts.num_controlled(position)

    def state_at(self, position: int) -> ControlState:
        position = self.count_at(position)
        if not self.remembers:
            return ControlState(position)
        known = self.states[min(position, len(self.states) - 1)]
        return ControlState(position, known.nats_spent, known.is_gate_open)

    def remember(self, position: int, numbers: Sequence[float]) -> None:
        figures, before = EditFigures.of(numbers), self.state_at(position)
        spent = before.nats_spent + figures.kl + (ROUNDING_NATS if figures.shift_ratio > 0 else 0.0)
        count = self.count_at(position)
        del self.states[count + 1 :]
        self.states.append(ControlState(count + 1, spent, bool(figures.is_gate_open)))


class StepReport:
    """What a step's edits did, on its way to the host; `resolve` waits for it, from whatever thread."""

    def __init__(
        self,
        rows: Sequence[Row | None],
        stats: Sequence[GroupStats],
        *,
        edit_s: float = 0.0,
        faults: Mapping[str, str] | None = None,
        warnings: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Faults and warnings are by request id."""
        self.drawn: Callable[[], Mapping[str, int]] | None = None
        """Waits for the step's tokens, by request id."""
        self._rows = rows
        self._edit_s = edit_s
        self._faults = dict(faults or {})
        self._warnings = dict(warnings or {})
        self._lock = threading.Lock()
        self._numbers: dict[str, list[float]] | None = None
        is_on_gpu = any(group.numbers_RN.is_cuda for group in stats)
        self._pending = [(group.group.rows, group.numbers_RN.to("cpu", non_blocking=True)) for group in stats]
        self._event = torch.cuda.Event() if is_on_gpu else None
        if self._event is not None:
            self._event.record()

    def resolve(self) -> dict[str, list[float]]:
        """Request id -> the numbers of its edit."""
        with self._lock:
            if self._numbers is None:
                if self._event is not None:
                    self._event.synchronize()
                self._numbers = {}
                for rows, numbers_RN in self._pending:
                    for row, numbers in zip(rows, numbers_RN.tolist(), strict=True):
                        its = self._rows[row]
                        assert its is not None
                        self._numbers[its.request_id] = numbers
                self._pending = []
            return self._numbers

    def positions(self) -> dict[str, int]:
        return {row.request_id: row.position for row in self._rows if row is not None}

    def as_plain_data(self) -> dict[str, Any]:
        """What travels to the scheduler's process."""
        data = {"edits": self.resolve(), "edit_s": self._edit_s, "faults": self._faults}
        return {**data, "warnings": self._warnings} if self._warnings else data


class RowControl:
    """One for each process that computes logits; used from vLLM's worker thread only."""

    def __init__(self, registry: HeadRegistry, unembedding: VllmUnembedding, parts: PartsReader | None = None) -> None:
        """`parts` is for requests whose control acts on a part of their response."""
        self.registry = registry
        self._parts = parts
        self._unembedding = unembedding
        self._editor = StateEditor(unembedding)
        self._requests: dict[str, _Request] = {}
        self._plan = EditPlan(())
        self._plan_controls: list[ControlParams | None] | None = None
        self._report: StepReport | None = None
        self._is_report_taken = True

    def use(self, registry: HeadRegistry) -> None:
        """The heads from the next step on."""
        self.registry = registry
        self._plan_controls = None

    def add(self, request_id: str, extra_args: Mapping[str, Any] | None, *, prompt_len: int) -> None:
        """Hear of a request. One that is known has been preempted and comes back: it goes on where it was."""
        if request_id in self._requests:
            self._requests[request_id].prompt_len = prompt_len
            return
        control, fault, parts, warnings = None, None, None, ()
        try:
            control = parse_control(extra_args)
            if control is not None:
                self.registry.check(control.head_names)
                if ID_KEY not in (extra_args or {}):
                    warnings, control = self._warnings(control), self._checked(control)
                opening = parse_opening(extra_args)
                parts = None if opening is None or self._parts is None else self._parts.start(opening)
        except (InvalidRequestError, UnknownHeadError) as error:
            # A server in front must refuse these; one that has not must not be able to stop the worker.
            control, fault = None, str(error)
        if control is not None or fault is not None:
            self._requests[request_id] = _Request(control, prompt_len, fault, warnings, parts)

    def remove(self, request_id: str) -> None:
        self._requests.pop(request_id, None)

    @property
    def is_idle(self) -> bool:
        """Whether no request is controlled, so that every `row` is None."""
        return not self._requests

    def row(self, request_id: str, num_tokens: int) -> Row | None:
        """Of a request that has so many tokens, prompt and new, before the one drawn now; None without control."""
        request = self._requests.get(request_id)
        return None if request is None else Row(request_id, num_tokens - request.prompt_len)

    def logits(self, hidden_BD: Tensor, rows: Sequence[Row | None]) -> Tensor:
        """Logits [B, V] float32 of a step's rows, of which those with a `Row` are controlled."""
        assert len(hidden_BD) == len(rows), "a row of vLLM's batch has more than one state"
        self._learn_from_last_step()
        controls = [None if row is None else self._acting(row) for row in rows]
        started_s = time.perf_counter()
        logits_BV, stats = self._edited(hidden_BD, rows, controls)
        edit_s = time.perf_counter() - started_s
        requests = {row.request_id: self._requests[row.request_id] for row in rows if row is not None}
        faults = {name: one.fault for name, one in requests.items() if one.fault is not None}
        warnings = {name: one.warnings for name, one in requests.items() if one.warnings}
        report = StepReport(rows, stats, edit_s=edit_s, faults=faults, warnings=warnings)
        self._report, self._is_report_taken = report, False
        return logits_BV

    def take_report(self) -> StepReport | None:
        """Of the step whose logits were computed last, once."""
        is_new, self._is_report_taken = not self._is_report_taken, True
        return self._report if is_new else None

    def _checked(self, control: ControlParams) -> ControlParams:
        """What this program's own server does before it asks its engine, which takes levels of values alone. Raises
        InvalidRequestError."""
        check_units(control, {name: self.registry.head(name).num_units for name in control.head_names})
        return in_values(control, self.registry.calibrations())

    def _warnings(self, control: ControlParams) -> list[str]:
        """Of its heads that were made for another model, and of those whose levels cannot be rewards."""
        of_heads = self.registry.warnings()
        unknown = uncalibrated(control, self.registry.calibrations())
        return [
            *(of_heads[name] for name in control.head_names if name in of_heads),
            *(UNCALIBRATED.format(name=name) for name in unknown),
        ]

    def _acting(self, row: Row) -> ControlParams | None:
        request = self._requests[row.request_id]
        try:
            return request.acting(row.position)
        except IndexError:
            _log.error("The token before place %d of request %s is not known", row.position, row.request_id)
            request.fault = _FAILED
            return None

    def _edited(
        self, hidden_BD: Tensor, rows: Sequence[Row | None], controls: list[ControlParams | None]
    ) -> tuple[Tensor, list[GroupStats]]:
        try:
            if self._plan_controls is None or not are_same(controls, self._plan_controls):
                self._plan = self._editor.plan(controls, self.registry, device=hidden_BD.device)
                self._plan_controls = controls
            self._unembedding.num_rows = len(hidden_BD)
            logits_BV, stats = self._editor.logits(hidden_BD, self._plan.at(lambda row: self._state(rows[row])))
        except Exception:
            _log.exception("Control failed; its requests end with an error, the others go on")
            self._plan_controls = None
            for row in rows:
                if row is not None:
                    self._requests[row.request_id].fault = _FAILED
            return self._unembedding.plain(hidden_BD), []
        if not self._unembedding.is_exact:
            base = [i for i, control in enumerate(controls) if control is None]
            if base:
                logits_BV[base] = self._unembedding.plain(hidden_BD)[base]
        return logits_BV, stats

    def _state(self, row: Row | None) -> ControlState:
        assert row is not None
        return self._requests[row.request_id].state_at(row.position)

    def _learn_from_last_step(self) -> None:
        """Wait for the last step's edits only where gate or response budget must know of them, and for its tokens where
        control acts on a part of a response."""
        report, self._report = self._report, None
        if report is None:
            return
        self._learn_edits(report)
        # After the edits, which belong to what was known then.
        followed = {name: position for name, position in report.positions().items() if self._is_followed(name)}
        if followed and report.drawn is not None:
            tokens = report.drawn()
            for name, position in followed.items():
                request = self._requests[name]
                assert request.control is not None
                assert request.parts is not None
                if name in tokens:
                    request.parts.hear(request.control, position, tokens[name])

    def _is_followed(self, name: str) -> bool:
        return name in self._requests and self._requests[name].parts is not None

    def _learn_edits(self, report: StepReport) -> None:
        waiting = {
            name: position
            for name, position in report.positions().items()
            if name in self._requests and self._requests[name].remembers
        }
        if waiting:
            edits = report.resolve()
            for name, position in waiting.items():
                if name in edits:
                    self._requests[name].remember(position, edits[name])
