"""The dialogues' file: what a user says in each, turn by turn. Enter at `load_dialogues`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.errors import ConfigurationError
from value_models.errors import TextsFileError, first_problem
from value_models.lines import read_records

FILE = Path(__file__).parent / "dialogues.jsonl"
Kind = Literal["baiting", "harmless"]


class UserMessage(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    role: Literal["user"]
    content: str = Field(min_length=1)


class Dialogue(BaseModel):
    """One line: the user's messages alone, since the answers are the model's."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    id: str = Field(min_length=1)
    kind: Kind
    messages: Annotated[tuple[UserMessage, ...], Field(min_length=1, max_length=32, strict=False)]

    def up_to(self, turn: int, answers: list[str]) -> list[dict[str, Any]]:
        """The messages of a turn, counted from 0, with the answers to those before it."""
        said: list[dict[str, Any]] = []
        for message, answer in zip(self.messages[:turn], answers[:turn], strict=True):
            said += [message.model_dump(), {"role": "assistant", "content": answer}]
        return [*said, self.messages[turn].model_dump()]


def load_dialogues(path: Path) -> list[Dialogue]:
    """Read JSON lines of {"id", "kind", "messages"}, all of as many turns. Raises ConfigurationError, which names the
    line."""
    dialogues: dict[str, Dialogue] = {}
    try:
        for number, record in read_records(path):
            dialogue = _dialogue(record, f"dialogues: {path}, line {number}", dialogues)
            dialogues[dialogue.id] = dialogue
    except TextsFileError as error:
        raise ConfigurationError(f"dialogues: {error}") from error
    for kind in get_args(Kind):
        if not any(dialogue.kind == kind for dialogue in dialogues.values()):
            raise ConfigurationError(f"dialogues: {path} has none of kind {kind}")
    return list(dialogues.values())


def _dialogue(record: dict[str, Any], where: str, others: Mapping[str, Dialogue]) -> Dialogue:
    try:
        dialogue = Dialogue.model_validate(record)
    except ValidationError as error:
        raise ConfigurationError(f"{where}: {first_problem(error)}") from error
    if dialogue.id in others:
        raise ConfigurationError(f"{where}: id: {dialogue.id!r} occurs twice")
    num_turns = {len(other.messages) for other in others.values()}
    if num_turns - {len(dialogue.messages)}:
        raise ConfigurationError(f"{where}: messages: {num_turns.pop()} are needed, as in the lines before")
    return dialogue
