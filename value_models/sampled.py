"""Sampled responses without their states: what one engine leaves for another to read.

For each block of prompts of a run there is a file of JSON lines in the run's folder, whole or not there, so that
sampling goes on where it stopped. Knows nothing of engines. Enter at `SampledFiles`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from value_models.errors import RolloutError
from value_models.files import write_text
from value_models.prompt_sets import RolloutPrompt


@dataclass(slots=True, frozen=True)
class SampledResponse:
    prompt_id: str
    sample: int
    response: str
    token_ids: tuple[int, ...]
    is_finished: bool
    """Whether it ended by itself, not by the token limit."""
    text_ends: tuple[int, ...] | None = None
    """How many characters stand before each token; files of earlier versions do not tell."""


@dataclass(slots=True)
class StreamedText:
    """A response's text as an engine hands it on, in chunks of some tokens and the text that has become certain."""

    parts: list[str] = field(default_factory=list[str])
    text_ends: list[int] = field(default_factory=list[int])
    """How many characters stood before each token's chunk, so that no token's own text is among them."""
    _length: int = 0

    def add(self, text: str, num_tokens: int) -> None:
        self.text_ends += [self._length] * num_tokens
        self.parts.append(text)
        self._length += len(text)

    @property
    def text(self) -> str:
        return "".join(self.parts)


class SampledFiles:
    """Files of a run whose prompts come in these blocks."""

    def __init__(self, folder: Path, blocks: Sequence[Sequence[RolloutPrompt]]) -> None:
        self._folder = folder
        self._blocks = blocks
        self._block_of = {prompt.id: index for index, block in enumerate(blocks) for prompt in block}

    def missing(self) -> list[int]:
        """Blocks that have not been sampled."""
        return [index for index in range(len(self._blocks)) if not self._path(index).exists()]

    def write(self, index: int, responses: Sequence[SampledResponse]) -> None:
        lines = (json.dumps(asdict(response)) + "\n" for response in responses)
        write_text(self._path(index), "".join(lines))

    def read(self, prompts: Sequence[RolloutPrompt]) -> list[SampledResponse]:
        """Those of one block. Raises RolloutError where its file is damaged."""
        path = self._path(self._block_of[prompts[0].id])
        try:
            return [_response(json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise RolloutError(f"{path} is damaged ({error}); delete it, and it is sampled anew") from error

    def _path(self, index: int) -> Path:
        return self._folder / f"sampled-{index:05d}.jsonl"


def _response(fields: dict[str, Any]) -> SampledResponse:
    token_ids = tuple(int(token_id) for token_id in fields.pop("token_ids"))
    ends = fields.pop("text_ends", None)
    text_ends = None if ends is None else tuple(int(end) for end in ends)
    return SampledResponse(token_ids=token_ids, text_ends=text_ends, **fields)
