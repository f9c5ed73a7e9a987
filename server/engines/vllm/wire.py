"""What this program's two sides say to each other through vLLM: control in `extra_args`, edits beside the tokens.

A request carries its control as one JSON string, since vLLM's HTTP server takes flat values only. An edit travels as a
flat list of numbers, a row of the editor's `GroupStats.numbers_RN`, whose heads are in the fixed order of
`ControlParams.head_names`. Knows neither vLLM nor tensors. Enter at `parse_control`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from server.control.params import ControlParams, UnderPinned
from server.errors import InvalidRequestError
from server.types import Opening

CONTROL_KEY = "recontrol"
"""In a request's `extra_args`: the `control` of this program's own API, as a JSON string."""
ID_KEY = "recontrol_id"
"""Set by this program's engine alone: the choice that edits are reported for."""
OPENING_KEY = "recontrol_opening"
"""Set by this program's engine alone: how a response begins of which control acts on a part."""
REPORT_KEY = "recontrol"
"""In `kv_transfer_params` of an output, and the attribute of a model runner's output."""
WORKER = "server.engines.vllm.worker.ControlWorker"
SCHEDULER = "server.engines.vllm.scheduler.ControlScheduler"
VALIDATOR = "server.engines.vllm.validation:ControlValidator"
"""What vLLM's options of these names are set to."""
CONFIG_KEY = "recontrol"
"""In vLLM's `additional_config`."""
HEADS_DIR_VARIABLE = "RECONTROL_HEADS_DIR"
"""The folder of value heads, where vLLM is not started by this program."""
OTHER_BASE_VARIABLE = "RECONTROL_ALLOW_OTHER_BASE"
"""Whether heads that were made for another model are served there: `true` or `false`."""


def parse_control(extra_args: Mapping[str, Any] | None) -> ControlParams | None:
    """None where a request asks for none. Raises InvalidRequestError, in words for whoever sent it."""
    payload = (extra_args or {}).get(CONTROL_KEY)
    if payload is None:
        return None
    if not isinstance(payload, str):
        raise InvalidRequestError(f"{CONTROL_KEY}: must be control as a JSON string", param=CONTROL_KEY)
    # What a server pins is put beneath a caller's control by this program alone.
    is_own = ID_KEY in (extra_args or {})
    try:
        return (UnderPinned if is_own and _has_pinned(payload) else ControlParams).model_validate_json(payload)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in error.errors())
        raise InvalidRequestError(f"{CONTROL_KEY}: {problems}", param=CONTROL_KEY) from error


def parse_opening(extra_args: Mapping[str, Any] | None) -> Opening | None:
    """How a response begins of which control acts on a part; None for others. Raises InvalidRequestError."""
    opening = (extra_args or {}).get(OPENING_KEY)
    try:
        return None if opening is None else Opening(opening)
    except ValueError as error:
        raise InvalidRequestError(f"{OPENING_KEY}: must be one of {', '.join(Opening)}", param=OPENING_KEY) from error


def _has_pinned(payload: str) -> bool:
    try:
        control = json.loads(payload)
    except (ValueError, RecursionError):
        return False
    return isinstance(control, dict) and "pinned" in control


def control_args(control: ControlParams, choice_id: str, opening: Opening | None = None) -> dict[str, Any]:
    """A choice's `extra_args`."""
    told = {} if opening is None else {OPENING_KEY: opening.value}
    return told | {CONTROL_KEY: json.dumps(control.model_dump(mode="json", exclude_none=True)), ID_KEY: choice_id}
