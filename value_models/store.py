"""Value heads as files: a folder with `head.safetensors` (tensors) and `card.json` (what the head is and how it came).

Loads nothing but safetensors and JSON, so a head from a stranger cannot run code. Knows nothing of servers or training.
Enter at `save_head` and `load_head`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Never

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator
from safetensors import SafetensorError
from safetensors.torch import load, save

from value_models.calibration import ExpectedRewards, RewardLevels
from value_models.errors import HeadFileError, HeadShapeError, first_problem
from value_models.files import write_bytes, write_text
from value_models.heads import UNIT_COST_NATS, ValueHead, head_from_tensors
from value_models.linalg import vector_norm

HEAD_FILE, CARD_FILE = "head.safetensors", "card.json"
SWEEP_FILE, MAP_FILE = "sweep.json", "map.json"
"""Figures of benchmarks/quality that are too long for a card; beside each lies its plot, an SVG."""
MAX_CARD_BYTES, MAX_HEAD_BYTES = 2 * 2**20, 512 * 2**20
"""The largest shipped card has 0.05 MiB, and the paper's heads for models of 7 billion parameters 270 MiB."""
MAX_FILE_BYTES = {CARD_FILE: MAX_CARD_BYTES, HEAD_FILE: MAX_HEAD_BYTES}
_MAX_HEADER_BYTES = 2**16
_MAX_LENGTH = 1e15
"""Of a row of inputs or of an ascent, and of a bias. Trained ones have some tens; the product of two such rows is far
from the end of float32."""
_MOST_EARNED = 1e6
"""Of what a card's figures say of a response, in standard deviations; heads have up to some tens."""
_DTYPES = frozenset({"F16", "BF16", "F32", "F64"})
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


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


class _GainReport(BaseModel):
    """The part of a card's `validation` and `data` that says what small edits along the head's ascent earned.

    `ascent_gain` is what value_models/ascent.py calls so, over `tokens` tokens of `responses` by split.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    ascent_gain: FiniteFloat
    tokens: int
    responses: dict[str, int]

    @property
    def earned(self) -> float:
        return self.ascent_gain * UNIT_COST_NATS**0.5 * self.tokens / max(sum(self.responses.values()), 1)


class _Rollouts(BaseModel):
    """The part of a card's `data` that says how long responses were."""

    model_config = ConfigDict(strict=True)

    max_tokens: int


def _earned(fields: dict[str, Any]) -> float | None:
    """Work out `HeadCard.earned` from a card's other fields. An imported head's card tells nothing of gains."""
    validation, data = fields["validation"], fields["data"]
    report = {"ascent_gain": validation.get("ascent_gain"), **{key: data.get(key) for key in ("tokens", "responses")}}
    try:
        earned = _GainReport.model_validate(report).earned
    except (ValidationError, OverflowError):
        return None
    return earned if 0 < earned <= _MOST_EARNED else None


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
    reward_mean: FiniteFloat
    reward_scale: FiniteFloat
    targets: str
    data: dict[str, Any]
    """Prompts, rollouts, sampling settings, and the split."""
    validation: dict[str, Any]
    """Figures on validation prompts, which training used to stop."""
    distillation: dict[str, Any] | None = None
    """Of a head made of an instruction: KL divergences on test prompts, in nats a token of the responses after the
    instruction and after the contrast.

    They are for the model before control (`bare`), and under the head at two lengths of ascent: the one that comes
    `nearest` to the instructed model, and the one that costs as much as the instruction itself (`at_equal_kl`). `paid`
    is KL(controlled || bare), `to_instructed` KL(instructed || controlled), `leaning` how much likelier the controlled
    model's tokens are after the instruction; the shares are of the ways from the bare model to the instructed one.
    """
    expected: ExpectedRewards | None = None
    """What reward the base model's responses get by their value; of heads that are trained on rewards or scores."""
    calibration: RewardLevels | None = None
    """What reward each level of the value gives; written by `recontrol calibrate`. Without it the head is uncalibrated,
    and its targets and floors are levels of the value."""
    evaluation: dict[str, Any] | None = None
    """The figures of every method on held-out prompts, by test set; written by `recontrol eval`."""
    stress: dict[str, Any] | None = None
    """The same at the corners of the ranges that a request may ask for; written by benchmarks/quality."""
    seeds: dict[str, Any] | None = None
    """What heads that were trained as this one was do, each on training prompts that a seed drew again; so too."""
    cost: dict[str, Any] | None = None
    """What a response of each method takes; written by benchmarks/quality."""
    command: str
    """What made this head."""
    tensors_sha256: str = ""
    """The digest of the file beside the card, written with it."""

    earned: float | None = Field(default_factory=_earned, exclude=True)
    """What an ascent of length 1 at every token of a response adds to its reward, to first order, in standard
    deviations of the training reward; None where the card does not tell, or where it adds nothing.

    A response is as long as those that the head was trained on. It follows from `validation` and `data`, so no file
    holds it: it is worked out when a card is made or read.
    """

    @property
    def trained_tokens(self) -> int | None:
        """How long the responses were that the head was trained on, as far as the card tells."""
        try:
            return _Rollouts.model_validate(self.data.get("rollouts")).max_tokens
        except ValidationError:
            return None

    @field_validator("earned", mode="before")
    @classmethod
    def _is_not_given(cls, _given: object) -> Never:
        raise ValueError("follows from validation.ascent_gain and data; leave it out")


def shipped_heads_folder(model_name: str) -> Path:
    """Where this package keeps the heads made for a model; it need not exist.

    Always a folder of its own, also for a name that reads like a path: names come out of files.
    """
    folder = re.sub(r"[^\w.-]|^\.+", "-", model_name, flags=re.ASCII) or "-"
    return Path(__file__).parent / "pretrained" / folder


def _short(model_name: str) -> str:
    """The model's name without what a hub's id or a folder's path puts before it."""
    return model_name.rstrip("/").rsplit("/", 1)[-1].casefold()


def tensors_digest(head: ValueHead) -> str:
    """A digest of what a head computes, wherever it came from."""
    digest = hashlib.sha256(head.type_name.encode())
    for name, tensor in sorted(head.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def architecture_card(head: ValueHead) -> ArchitectureCard:
    return ArchitectureCard(
        type=head.type_name,
        num_units=head.num_units,
        hidden_widths=head.hidden_widths,
        num_parameters=head.num_parameters,
    )


def save_head(folder: Path, head: ValueHead, card: HeadCard) -> None:
    """Write both files, each whole or not at all; the card goes last, so a folder with a card is complete.

    Raises HeadFileError for numbers that are not finite, which nothing would load, before it touches a head that is
    there.
    """
    tensors = {name: tensor.contiguous() for name, tensor in head.state_dict().items()}
    _check_finite(head, str(folder / HEAD_FILE))
    # A head that is replaced must not be left with the old one's card and figures.
    for name in (CARD_FILE, SWEEP_FILE, MAP_FILE):
        for path in (folder / name, (folder / name).with_suffix(".svg")):
            path.unlink(missing_ok=True)
    data = save(tensors)
    write_bytes(folder / HEAD_FILE, data)
    save_card(folder, card.model_copy(update={"tensors_sha256": hashlib.sha256(data).hexdigest()}))


def save_card(folder: Path, card: HeadCard) -> None:
    """Replace a head's card."""
    write_text(folder / CARD_FILE, json.dumps(card.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n")


def load_card(folder: Path) -> HeadCard:
    """Read a head's card. Raises HeadFileError."""
    path = folder / CARD_FILE
    try:
        return parse_card(read_file(path), str(path))
    except OSError as error:
        raise HeadFileError(f"{path} cannot be read: {error.strerror}") from error


def parse_card(data: bytes, where: str) -> HeadCard:
    """Parse a card's file; `where` it lies goes into messages. Raises HeadFileError."""
    check_size(len(data), CARD_FILE, where)
    try:
        return HeadCard.model_validate_json(data)
    except ValidationError as error:
        raise HeadFileError(f"{where} is not a head card: {first_problem(error, 'the file')}") from error


def read_file(path: Path) -> bytes:
    """One of a head's two files.

    Raises HeadFileError for one that is too large, before it is read, and for what is no file, such as a named pipe, in
    which whoever reads would wait for ever; and OSError.
    """
    with open(path, "rb", opener=_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise HeadFileError(f"{path} is not a file")
        # Measured on the open file, and bounded all the same: it may grow, or have no size.
        check_size(status.st_size, path.name, str(path))
        data = file.read(MAX_FILE_BYTES[path.name] + 1)
    check_size(len(data), path.name, str(path))
    return data


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def check_size(num_bytes: int, file: str, where: str) -> None:
    """Raises HeadFileError for a file of a head that is larger than any has to be."""
    if num_bytes > MAX_FILE_BYTES[file]:
        raise HeadFileError(f"{where} is larger than {MAX_FILE_BYTES[file] // 2**20} MiB, which no {file} has to be")


def load_head(folder: Path, *, device: torch.device | str = "cpu") -> tuple[ValueHead, HeadCard]:
    """Read a head and its card.

    Raises HeadFileError when a file is missing, or when the tensors are not what the card says.
    """
    card = load_card(folder)
    path = folder / HEAD_FILE
    try:
        # Read, not mapped: a server that has loaded a head must outlive the file's being written over.
        data = read_file(path)
    except OSError as error:
        raise HeadFileError(f"{path} cannot be loaded: {error}") from error
    return head_from_bytes(data, card, str(path), device=device), card


def head_from_bytes(data: bytes, card: HeadCard, where: str, *, device: torch.device | str = "cpu") -> ValueHead:
    """Make a head of a file of tensors, which must be the card's own; `where` it lies goes into messages.

    Raises HeadFileError.
    """
    if hashlib.sha256(data).hexdigest() != card.tensors_sha256:
        raise HeadFileError(f"{where} is not the file that its card was written for (tensors_sha256 differs)")
    _check_header(data, where)
    try:
        tensors = {name: tensor.to(device) for name, tensor in load(data).items()}
        head = head_from_tensors(card.architecture.type, tensors)
    except (SafetensorError, HeadShapeError) as error:
        raise HeadFileError(f"{where} cannot be loaded: {error}") from error
    except Exception as error:
        # A stranger's file; what nobody thought of must not get past those who expect HeadFileError.
        raise HeadFileError(f"{where} cannot be loaded: {type(error).__name__}: {error}") from error
    _check_finite(head, where)
    if head.hidden_size != card.base_model.hidden_size:
        raise HeadFileError(
            f"{where} reads states of size {head.hidden_size}, but its card says {card.base_model.hidden_size}"
        )
    if head.num_units != card.architecture.num_units:
        # By which a server bounds what a request's heads take together.
        raise HeadFileError(f"{where} has {head.num_units} units, but its card says {card.architecture.num_units}")
    return head


def _check_header(data: bytes, where: str) -> None:
    """Look at what the file says of itself before anything is made of it. Raises HeadFileError."""
    size = int.from_bytes(data[:8], "little")
    if not 0 < size <= _MAX_HEADER_BYTES:
        raise HeadFileError(f"{where} cannot be loaded: its header has {size} bytes; at most {_MAX_HEADER_BYTES}")
    try:
        header = json.loads(data[8 : 8 + size])
        dtypes = {name: entry["dtype"] for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
        raise HeadFileError(f"{where} cannot be loaded: its header is not one of safetensors") from error
    for name, dtype in dtypes.items():
        if dtype not in _DTYPES:
            allowed = ", ".join(sorted(_DTYPES))
            raise HeadFileError(f"{where} cannot be loaded: {name} is of type {dtype!r}; allowed are {allowed}")


def _check_finite(head: ValueHead, where: str) -> None:
    """Raises HeadFileError for numbers that are not finite, in float32 and with the normalisation folded in, or so
    large that products of them are not: beside such a head no other one could be computed."""
    (inputs_UD, bias_U), ascent_UD = head.folded_inputs(), head.folded_ascent()
    lengths = [float(vector_norm(rows).max()) for rows in (inputs_UD, bias_U[:, None], ascent_UD)]
    is_finite = all(tensor.isfinite().all() for tensor in head.state_dict().values())
    if not is_finite or not all(length <= _MAX_LENGTH for length in lengths):
        raise HeadFileError(f"{where} holds numbers that are not finite, or whose products are not")
