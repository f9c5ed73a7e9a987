"""From a step's report to its outputs: each token's edit for this program's engine, a summary for everyone else.

Knows no vLLM. Enter at `Delivery.fill`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from server.engines.embedded.sequence import EditTotals
from server.engines.vllm.wire import ID_KEY, REPORT_KEY, decode_edit, parse_control
from server.errors import InvalidRequestError
from server.types import ControlParams


class Delivery:
    """Lives in the scheduler; keeps sums for controlled requests that are not this program's engine's."""

    def __init__(self) -> None:
        self._totals: dict[str, tuple[ControlParams, EditTotals]] = {}

    def expect(self, request_id: str, extra_args: Mapping[str, Any] | None) -> None:
        if extra_args is None or ID_KEY in extra_args:
            return
        try:
            control = parse_control(extra_args)
        except InvalidRequestError:
            return  # The worker says so in its report.
        if control is not None:
            self._totals[request_id] = (control, EditTotals())

    def forget(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._totals.pop(request_id, None)

    def fill(self, output: Any, report: Mapping[str, Any] | None) -> str | None:
        """Put into an `EngineCoreOutput` what the step's report says of it; why its request has failed, if it has."""
        request_id = output.request_id
        if report is not None and output.new_token_ids:
            if (fault := report["faults"].get(request_id)) is not None:
                self.forget([request_id])
                return fault
            if (entry := report["edits"].get(request_id)) is not None:
                self._fill(output, entry)
        if output.finish_reason is not None and (kept := self._totals.pop(request_id, None)) is not None:
            _put(output, {"control": asdict(kept[1].summary())})
        return None

    def _fill(self, output: Any, entry: Mapping[str, Any]) -> None:
        if entry["id"] is not None:
            _put(output, dict(entry))
        elif (kept := self._totals.get(output.request_id)) is not None:
            control, totals = kept
            totals.add(decode_edit(control, entry["edit"]))


def _put(output: Any, data: dict[str, Any]) -> None:
    output.kv_transfer_params = {**(output.kv_transfer_params or {}), REPORT_KEY: data}
