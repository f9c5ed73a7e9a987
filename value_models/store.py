"""Value heads as files: a folder with `head.safetensors` (tensors) and `card.json` (what the head is and how it came).

Loads nothing but safetensors and JSON, so a head from a stranger cannot run code. Knows nothing of servers or training.
Enter at `save_head` and `load_head`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from value_models.heads import UNIT_COST_NATS, HeadShapeError, MLPHead, ValueHead, head_from_tensors
from value_models.whole_files import write_text, write_whole

HEAD_FILE, CARD_FILE = "head.safetensors", "card.json"
SWEEP_FILE, MAP_FILE = "sweep.json", "map.json"
"""Figures of benchmarks/quality that are too long for a card; beside each lies its plot, an SVG."""
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class HeadFileError(ValueError):
    """A head's folder is incomplete or wrong; the message names the file and the field."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BaseModelCard(_Frozen):
    """Which language model's states a head reads. An imported head may know its name alone."""

    name: str
    architecture: str | None = None
    hidden_size: int = Field(gt=0)
    vocab_size: int | None = None
    fingerprint: str | None = None

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """What tells this model from one with identity `other`, in words; empty when they are the same.

        Folders are renamed, so a fingerprint decides over the name; without one the name is all there is to go by.
        """
        differences = [
            f"{field} is {other.get(field)!r}, the head was made for {mine!r}"
            for field in ("hidden_size", "vocab_size", "architecture", "fingerprint")
            if (mine := getattr(self, field)) is not None and mine != other.get(field)
        ]
        if self.fingerprint is None and _short(self.name) != _short(str(other.get("name"))):
            differences.append(
                f"name is {other.get('name')!r}, the head was made for {self.name!r}, of which its card has no "
                "fingerprint"
            )
        return differences


class ArchitectureCard(_Frozen):
    type: str
    num_units: int
    hidden_widths: list[int] = []
    num_parameters: int


class HeadCard(_Frozen):
    """Everything a user should know of a head before trusting it."""

    format_version: Literal[2] = 2
    name: str = Field(pattern=NAME_PATTERN)
    description: str
    base_model: BaseModelCard
    architecture: ArchitectureCard
    normalisation: str
    metric: str
    """Which way the head ascends, and what a step of length 1 costs."""
    reward: str
    reward_mean: float
    reward_scale: float
    targets: str
    data: dict[str, Any]
    """Prompts, rollouts, sampling settings, and the split."""
    validation: dict[str, Any]
    """Figures on validation prompts, which training used to stop."""
    evaluation: dict[str, Any] | None = None
    """By test set, figures on held-out prompts of every method; written by `recontrol eval`."""
    stress: dict[str, Any] | None = None
    """The same at the corners of the ranges that a request may ask for; written by benchmarks/quality."""
    cost: dict[str, Any] | None = None
    """What a response of each method takes; written by benchmarks/quality."""
    command: str
    """What made this head."""
    tensors_sha256: str = ""
    """Of the file beside the card; written with it."""

    @property
    def earned(self) -> float | None:
        """What an ascent of length 1 at every token of a response adds to its reward, to first order, in standard
        deviations of the training reward; None where the card does not tell, or where it adds nothing.

        A response is as long as those that the head was trained on (see `ascent_gain` in value_models/ascent.py).
        """
        gain, tokens = self.validation.get("ascent_gain"), self.data.get("tokens")
        responses = self.data.get("responses")
        if not isinstance(gain, float) or not isinstance(tokens, int) or not isinstance(responses, dict):
            return None
        earned = gain * UNIT_COST_NATS**0.5 * tokens / max(sum(responses.values()), 1)
        return earned if earned > 0 else None


def shipped_heads_folder(model_name: str) -> Path:
    """Where this package keeps the heads made for a model; it need not exist."""
    return Path(__file__).parent / "pretrained" / model_name


def _short(model_name: str) -> str:
    """A hub's id and a folder's path end in the model's name."""
    return model_name.rstrip("/").rsplit("/", 1)[-1].casefold()


def tensors_digest(head: ValueHead) -> str:
    """Of what a head computes, wherever it came from."""
    digest = hashlib.sha256(head.type_name.encode())
    for name, tensor in sorted(head.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def architecture_card(head: ValueHead) -> ArchitectureCard:
    tensors = head.state_dict()
    later = [tensors[name].shape[0] for name in sorted(tensors) if name.startswith("hidden_weight_")]
    widths = [head.num_units - 1, *later] if isinstance(head, MLPHead) else []
    counted = sum(t.numel() for name, t in tensors.items() if name.startswith(("inputs", "input_", "hidden", "out")))
    return ArchitectureCard(type=head.type_name, num_units=head.num_units, hidden_widths=widths, num_parameters=counted)


def save_head(folder: Path, head: ValueHead, card: HeadCard) -> None:
    """Write both files, each whole or not at all; the card goes last, so a folder with a card is complete."""
    tensors = {name: tensor.contiguous() for name, tensor in head.state_dict().items()}
    # A head that is replaced must not be left with the old one's card and figures.
    for name in (CARD_FILE, SWEEP_FILE, MAP_FILE):
        for path in (folder / name, (folder / name).with_suffix(".svg")):
            path.unlink(missing_ok=True)
    write_whole(folder / HEAD_FILE, lambda scratch: save_file(tensors, scratch))
    save_card(folder, card.model_copy(update={"tensors_sha256": _digest(folder / HEAD_FILE)}))


def save_card(folder: Path, card: HeadCard) -> None:
    """Replace a head's card."""
    write_text(folder / CARD_FILE, json.dumps(card.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n")


def load_card(folder: Path) -> HeadCard:
    """Raises HeadFileError."""
    path = folder / CARD_FILE
    try:
        return parse_card(path.read_bytes(), str(path))
    except OSError as error:
        raise HeadFileError(f"{path} cannot be read: {error.strerror}") from error


def parse_card(data: bytes, where: str) -> HeadCard:
    """A card's file; `where` it lies goes into messages. Raises HeadFileError."""
    try:
        return HeadCard.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise HeadFileError(f"{where} is not a head card: {field}: {first['msg']}") from error


def load_head(folder: Path, *, device: torch.device | str = "cpu") -> tuple[ValueHead, HeadCard]:
    """Raises HeadFileError when a file is missing, or the tensors are not what the card says."""
    card = load_card(folder)
    path = folder / HEAD_FILE
    try:
        # Read, not mapped: a server that has loaded a head must outlive the file's being written over.
        data = path.read_bytes()
    except OSError as error:
        raise HeadFileError(f"{path} cannot be loaded: {error}") from error
    return head_from_bytes(data, card, str(path), device=device), card


def head_from_bytes(data: bytes, card: HeadCard, where: str, *, device: torch.device | str = "cpu") -> ValueHead:
    """A file of tensors, which must be the card's own; `where` it lies goes into messages. Raises HeadFileError."""
    if hashlib.sha256(data).hexdigest() != card.tensors_sha256:
        raise HeadFileError(f"{where} is not the file that its card was written for (tensors_sha256 differs)")
    try:
        tensors = {name: tensor.to(device) for name, tensor in load(data).items()}
        head = head_from_tensors(card.architecture.type, tensors)
    except (SafetensorError, HeadShapeError) as error:
        raise HeadFileError(f"{where} cannot be loaded: {error}") from error
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise HeadFileError(f"{where} holds numbers that are not finite")
    if head.hidden_size != card.base_model.hidden_size:
        raise HeadFileError(
            f"{where} reads states of size {head.hidden_size}, but its card says {card.base_model.hidden_size}"
        )
    return head


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
