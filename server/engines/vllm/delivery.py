"""From a step's report to its outputs: each token's edit for this program's engine, a summary for everyone else.

Knows no vLLM. Enter at `Delivery.fill`.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from server.control.params import ControlParams
from server.control.state import HELD_BY
from server.engines.embedded.sequence import EditTotals
from server.engines.vllm.wire import ID_KEY, REPORT_KEY, parse_control
from server.errors import InvalidRequestError


class _Sums:
    """`EditTotals` of a request's tokens, straight from their numbers: a step of the scheduler has a row of them."""

    def __init__(self, control: ControlParams) -> None:
        self.names = control.head_names
        self._num_tokens, self._num_moved, self._max_kl = 0, 0, 0.0
        self._sums = [0.0] * (2 * len(self.names) + 5)
        self._held: Counter[float] = Counter()

    def add(self, numbers: Sequence[float]) -> None:
        """As `GroupStats.numbers_RN` has them."""
        kl, shift_ratio, held_by, _, _ = numbers[-5:]
        self._num_tokens += 1
        self._num_moved += shift_ratio > 0
        self._max_kl = max(self._max_kl, kl)
        self._held[held_by] += 1
        self._sums = list(map(operator.add, self._sums, numbers))

    def totals(self) -> EditTotals:
        size = len(self.names)
        kl, shift_ratio, _, nonfinite, _ = self._sums[2 * size :]
        return EditTotals(
            num_tokens=self._num_tokens,
            num_moved=self._num_moved,
            num_nonfinite=round(nonfinite),
            sum_kl=kl,
            max_kl=self._max_kl,
            sum_shift=shift_ratio,
            held=Counter({why.value: n for code, n in self._held.items() if (why := HELD_BY[int(code)]) is not None}),
            sum_before=dict(zip(self.names, self._sums[:size], strict=True)),
            sum_after=dict(zip(self.names, self._sums[size : 2 * size], strict=True)),
        )


class Delivery:
    """Lives in the scheduler; knows which controlled requests are this program's engine's, and sums for the others."""

    def __init__(self) -> None:
        self._choice_ids: dict[str, str] = {}
        self._sums: dict[str, _Sums] = {}
        self._warnings: Mapping[str, str] = {}
        """Of heads that were made for another model, as the last report has them."""

    def expect(self, request_id: str, extra_args: Mapping[str, Any] | None) -> None:
        if extra_args is None:
            return
        if ID_KEY in extra_args:
            self._choice_ids[request_id] = extra_args[ID_KEY]
            return
        try:
            control = parse_control(extra_args)
        except InvalidRequestError:
            return  # The worker says so in its report.
        if control is not None:
            self._sums[request_id] = _Sums(control)

    def forget(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._choice_ids.pop(request_id, None)
            self._sums.pop(request_id, None)

    def fill(self, output: Any, report: dict[str, Any] | None) -> str | None:
        """Put into an `EngineCoreOutput` what the step's report says of it; why its request has failed, if it has."""
        request_id = output.request_id
        if report is not None:
            self._warnings = report.get("warnings", {})
        if report is not None and output.new_token_ids:
            if (fault := report["faults"].get(request_id)) is not None:
                self.forget([request_id])
                return fault
            if (numbers := report["edits"].get(request_id)) is not None:
                self._fill(output, numbers, report)
        if output.finish_reason is not None:
            self._choice_ids.pop(request_id, None)
            if (sums := self._sums.pop(request_id, None)) is not None:
                _put(output, {"control": self._summary(sums)})
        return None

    def _summary(self, sums: _Sums) -> dict[str, Any]:
        """As this program's own API has it."""
        summary = asdict(sums.totals().summary())
        warnings = [self._warnings[name] for name in sums.names if name in self._warnings]
        return {**summary, "warnings": warnings} if warnings else summary

    def _fill(self, output: Any, numbers: list[float], report: dict[str, Any]) -> None:
        if (choice_id := self._choice_ids.get(output.request_id)) is not None:
            entry: dict[str, Any] = {"id": choice_id, "edit": numbers}
            # A step is one edit: whoever sums them up must hear of its duration once.
            if (edit_s := report.pop("edit_s", None)) is not None:
                entry["edit_s"] = edit_s
            _put(output, entry)
        elif (sums := self._sums.get(output.request_id)) is not None:
            sums.add(numbers)


def _put(output: Any, data: dict[str, Any]) -> None:
    output.kv_transfer_params = {**(output.kv_transfer_params or {}), REPORT_KEY: data}
