"""From a step's report to its outputs: each token's edit for this program's engine, a summary for everyone else.

Knows no vLLM. Enter at `Delivery.fill`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from server.engines.edits import EditTotals
from server.engines.vllm.wire import ID_KEY, REPORT_KEY, parse_control
from server.errors import InvalidRequestError


class Delivery:
    """Lives in the scheduler; knows which controlled requests are this program's engine's, and sums for the others."""

    def __init__(self) -> None:
        self._choice_ids: dict[str, str] = {}
        self._totals: dict[str, EditTotals] = {}
        self._warnings: dict[str, Sequence[str]] = {}
        """Of requests of a plain server, what their senders must know of their heads."""

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
            self._totals[request_id] = EditTotals(control.head_names)

    def forget(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._choice_ids.pop(request_id, None)
            self._totals.pop(request_id, None)
            self._warnings.pop(request_id, None)

    def fill(self, output: Any, report: dict[str, Any] | None) -> str | None:
        """Put into an `EngineCoreOutput` what the step's report says of it; why its request has failed, if it has."""
        request_id = output.request_id
        if report is not None and output.new_token_ids:
            if (fault := report["faults"].get(request_id)) is not None:
                self.forget([request_id])
                return fault
            if (warnings := report.get("warnings", {}).get(request_id)) is not None:
                self._warnings[request_id] = warnings
            if (numbers := report["edits"].get(request_id)) is not None:
                self._fill(output, numbers, report)
        if output.finish_reason is not None:
            if (totals := self._totals.get(request_id)) is not None:
                _put(output, {"control": self._summary(request_id, totals)})
            self.forget([request_id])
        return None

    def _summary(self, request_id: str, totals: EditTotals) -> dict[str, Any]:
        """As this program's own API has it."""
        summary = totals.summary().as_dict()
        warnings = self._warnings.get(request_id)
        return {**summary, "warnings": list(warnings)} if warnings else summary

    def _fill(self, output: Any, numbers: list[float], report: dict[str, Any]) -> None:
        if (choice_id := self._choice_ids.get(output.request_id)) is not None:
            entry: dict[str, Any] = {"id": choice_id, "edit": numbers}
            # A step is one edit: whoever sums them up must hear of its duration once.
            if (edit_s := report.pop("edit_s", None)) is not None:
                entry["edit_s"] = edit_s
            _put(output, entry)
        elif (totals := self._totals.get(output.request_id)) is not None:
            totals.add(numbers)


def _put(output: Any, data: dict[str, Any]) -> None:
    output.kv_transfer_params = {**(output.kv_transfer_params or {}), REPORT_KEY: data}
