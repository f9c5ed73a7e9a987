"""For `--logits-processors` of vLLM's own server: control that cannot be served gets a 400 there.

It touches no logits. vLLM hands it every request's parameters in the process that speaks HTTP, for which it has to be a
logits processor of both model runners. Knows the heads by the folder in RECONTROL_HEADS_DIR. Enter at
`ControlValidator.validate_params`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from vllm.exceptions import VLLMValidationError  # pyright: ignore[reportMissingImports]
from vllm.v1.sample.logits_processor import (  # pyright: ignore[reportMissingImports]
    LogitsProcessor as LogitsProcessorV1,
)
from vllm.v1.worker.gpu.sample.logits_processor.interface import (  # pyright: ignore[reportMissingImports]
    LogitsProcessor as LogitsProcessorV2,
)

from server.control.levels import in_values
from server.control.params import check_units
from server.engines.vllm.sampling import OBJECTIVES
from server.engines.vllm.wire import CONTROL_KEY, HEADS_DIR_VARIABLE, ID_KEY, OPENING_KEY, parse_control
from server.errors import InvalidRequestError, RecontrolError, UnknownHeadError
from value_models.errors import HeadFileError
from value_models.store import CARD_FILE, HeadCard, load_card


class ControlValidator(LogitsProcessorV1, LogitsProcessorV2):
    def __init__(self, *_: Any, **__: Any) -> None: ...

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raises VLLMValidationError."""
        try:
            check_plain(sampling_params.extra_args or {}, Path(os.environ.get(HEADS_DIR_VARIABLE, "")))
        except RecontrolError as error:
            raise VLLMValidationError(error.message, parameter="vllm_xargs") from error

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:  # noqa: ARG002
        """Not wanted for any row."""
        return False

    def update_state(self, batch_update: Any) -> None: ...

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: Tensor, *_: Any) -> Tensor:
        return logits


def check_plain(extra_args: Mapping[str, Any], heads_dir: Path) -> None:
    """Raises InvalidRequestError or UnknownHeadError for what a plain vLLM server with control cannot do."""
    for key in (ID_KEY, OPENING_KEY):
        if key in extra_args:
            raise InvalidRequestError(f"{key}: is for this program's own server")
    control = parse_control(extra_args)
    if control is None:
        return
    own = {
        "over_turns": "counts no turns", "stop_below": "ends no response", "trace": "reports no single token",
        "search": "compares no candidates",
    }  # fmt: skip
    for field, why in own.items():
        if getattr(control, field):
            raise InvalidRequestError(f"{CONTROL_KEY}: {field}: vLLM's own server {why}; use `recontrol serve`")
    if control.phase != "both":
        raise InvalidRequestError(
            f"{CONTROL_KEY}: phase: vLLM's own server tells no parts of a response apart; use `recontrol serve`"
        )
    if control.objective.type not in OBJECTIVES:
        raise InvalidRequestError(
            f"{CONTROL_KEY}: objective.type: vLLM's own server reads no text a second time; use `recontrol serve` "
            "with the embedded engine"
        )
    heads = [card.parent.name for card in heads_dir.glob(f"*/{CARD_FILE}")]
    for name in control.head_names:
        if name not in heads:
            raise UnknownHeadError(name, heads)
    cards = _cards(heads_dir, control.head_names)
    check_units(control, {name: card.architecture.num_units for name, card in cards.items()})
    in_values(control, {name: card.calibration for name, card in cards.items() if card.calibration is not None})


def _cards(heads_dir: Path, names: Iterable[str]) -> dict[str, HeadCard]:
    """By head. Raises InvalidRequestError for a card that cannot be read."""
    try:
        return {name: load_card(heads_dir / name) for name in names}
    except HeadFileError as error:
        raise InvalidRequestError(f"{CONTROL_KEY}: {error}") from error
