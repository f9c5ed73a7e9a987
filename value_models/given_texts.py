"""Texts that users bring to train a head on: pairs of a better and a worse response, or single texts with numbers.

Pairs are those of direct preference optimisation, in TRL's forms: `prompt`, `chosen` and `rejected` as strings or as
lists of messages, or `chosen` and `rejected` alone, which begin with the prompt. All are read and checked before
anything is done with them. Knows nothing of models or tokens. Enter at `read_pairs` and `read_texts` with a file, at
`pairs_of` and `texts_of` with records.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from value_models.errors import TextsFileError
from value_models.lines import FileOrigin, Origin, Record, read_records
from value_models.messages import Message, check_is_prompt, read_messages, read_prompt_messages, read_text

MIN_PROMPTS = 8
"""Fewer leave nothing to learn from beside what is held out."""
MIN_REWARD_SCALE = 1e-5
"""Standard deviation of training rewards below which they are taken for the same."""
MAX_SCORE = 1e12
"""Scores are float32, as are the squares and sums that are made of them."""
_VALIDATION_SHARE = 0.2
_MIN_VALIDATION = 2
Prompt = str | tuple[Message, ...]
"""A text that is continued as it is, or a conversation that goes through the chat template."""
Kind = Literal["pairs", "texts"]
_PAIR_FIELDS = ("prompt", "messages", "chosen", "rejected")
_TEXT_FIELDS = ("text", "prompt", "messages", "response", "completion", "label", "score")
_PAIR_NEEDS = (("chosen",), ("rejected",))
_TEXT_NEEDS = (("text", "response", "completion", "messages"), ("label", "score"))
"""One field of each group is in every record."""


@dataclass(slots=True, frozen=True)
class GivenText:
    """One response with the number that training raises; of a pair, 1 for the chosen and -1 for the rejected one."""

    line: int
    prompt: Prompt
    response: str
    score: float
    sample: int = 0
    """Its place in its line."""

    @property
    def prompt_id(self) -> str:
        """It is one for all texts with the same prompt. A text without a prompt has its own."""
        text = json.dumps(self.prompt if self.prompt else [self.line], ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(slots=True, frozen=True)
class GivenTexts:
    """All of a file or a request, in their order; of pairs, each chosen text is followed by its rejected one."""

    origin: Origin
    kind: Kind
    texts: list[GivenText]

    def __post_init__(self) -> None:
        """Raises TextsFileError for fewer prompts than a head can be learnt from."""
        num_prompts = len({text.prompt_id for text in self.texts})
        if num_prompts < MIN_PROMPTS:
            held = f"{len(self.texts) // 2} pairs" if self.kind == "pairs" else f"{len(self.texts)} texts"
            raise TextsFileError(
                f"{self.origin}: {held} of {num_prompts} different prompts; at least {MIN_PROMPTS} are needed, "
                "since a fifth is held out"
            )

    def check_spread(self, *, is_centred: bool) -> None:
        """Raises TextsFileError where training would see one score alone; `is_centred` looks within each prompt."""
        held_out = validation_prompts(text.prompt_id for text in self.texts)
        by_prompt: dict[str, list[float]] = {}
        for text in self.texts:
            if (prompt_id := text.prompt_id) not in held_out:
                by_prompt.setdefault(prompt_id, []).append(array("f", [text.score])[0])
        rewards = [
            score - (statistics.fmean(scores) if is_centred else 0.0)
            for scores in by_prompt.values()
            for score in scores
        ]
        if not statistics.pstdev(rewards) > MIN_REWARD_SCALE:
            within = " within each prompt, whose mean --center-by-prompt subtracts" if is_centred else ""
            raise TextsFileError(
                f"{self.origin}: apart from the {len(held_out)} prompts that are held out all texts have the same "
                f"score{within} (their standard deviation is not above {MIN_REWARD_SCALE:g}); a head needs better and "
                "worse ones"
            )

    @property
    def sha256(self) -> str:
        """Of what was read."""
        digest = hashlib.sha256(self.kind.encode())
        for text in self.texts:
            digest.update(json.dumps([text.prompt, text.response, text.score]).encode())
        return digest.hexdigest()

    def where(self, text: GivenText) -> str:
        return self.origin.at(text.line)


def read_pairs(path: Path, *, as_chat: bool = False, ignore: Sequence[str] = ()) -> GivenTexts:
    """Read a file of pairs; see `pairs_of`. Raises TextsFileError with the line's number, MissingPackageError."""
    return pairs_of(read_records(path), FileOrigin(path), as_chat=as_chat, ignore=ignore)


def pairs_of(
    records: Iterable[Record], origin: Origin, *, as_chat: bool = False, ignore: Sequence[str] = ()
) -> GivenTexts:
    """Pairs. With `as_chat` a prompt that is a string is what a user asks. `ignore` names fields to leave out.

    Raises TextsFileError, which says of which record.
    """
    texts: list[GivenText] = []
    seen: dict[frozenset[tuple[str, str]], int] = {}
    for number, record in records:
        where = origin.at(number)
        for (name,) in _PAIR_NEEDS:
            if name not in record:
                raise TextsFileError(f"{where}: {name} is missing; it has {_names(record)}")
        kept = _kept(record, _PAIR_FIELDS, _PAIR_NEEDS, ignore, where)
        prompt, chosen, rejected = _pair(kept, as_chat, where)
        if chosen == rejected:
            raise TextsFileError(f"{where}: chosen and rejected are equal; which one is better?")
        key = frozenset({(json.dumps(prompt), chosen), (json.dumps(prompt), rejected)})
        if key in seen:
            raise TextsFileError(
                f"{where}: the same two responses as in {origin.item(seen[key])}; leave one of them out"
            )
        seen[key] = number
        texts += [GivenText(number, prompt, chosen, 1.0), GivenText(number, prompt, rejected, -1.0, 1)]
    return GivenTexts(origin, "pairs", _some(texts, origin))


def read_texts(
    path: Path, *, good_label: str | None = None, as_chat: bool = False, ignore: Sequence[str] = ()
) -> GivenTexts:
    """Read a file of single texts; see `texts_of`.

    Raises TextsFileError with the line's number, MissingPackageError.
    """
    return texts_of(read_records(path), FileOrigin(path), good_label=good_label, as_chat=as_chat, ignore=ignore)


def texts_of(
    records: Iterable[Record],
    origin: Origin,
    *,
    good_label: str | None = None,
    as_chat: bool = False,
    ignore: Sequence[str] = (),
) -> GivenTexts:
    """Single texts with a score or a label each, which are 1 and 0; `good_label` is the one to raise.

    Without it the greater of two numbers is, and true. Raises TextsFileError, which says of which record.
    """
    found: list[tuple[int, Prompt, str, dict[str, Any]]] = []
    seen: dict[tuple[str, str], int] = {}
    for number, record in records:
        where = origin.at(number)
        kept = _kept(record, _TEXT_FIELDS, _TEXT_NEEDS, ignore, where)
        prompt, response = _single(kept, as_chat, where)
        key = (json.dumps(prompt), response)
        if key in seen:
            raise TextsFileError(f"{where}: the same text as in {origin.item(seen[key])}; leave one of them out")
        seen[key] = number
        found.append((number, prompt, response, kept))
    scores = _scores([(number, record) for number, _, _, record in found], good_label, origin)
    texts = [
        GivenText(number, prompt, response, score)
        for (number, prompt, response, _), score in zip(found, scores, strict=True)
    ]
    if texts and len({text.score for text in texts}) == 1:
        raise TextsFileError(f"{origin}: all texts have the same score; a head needs better and worse ones")
    return GivenTexts(origin, "texts", _some(texts, origin))


def validation_prompts(prompt_ids: Iterable[str]) -> set[str]:
    """A fifth of the prompts, and at least two: those with the smallest ids, which are digests."""
    distinct = sorted(set(prompt_ids))
    return set(distinct[: max(_MIN_VALIDATION, round(_VALIDATION_SHARE * len(distinct)))])


def _pair(record: dict[str, Any], as_chat: bool, where: str) -> tuple[Prompt, str, str]:
    chosen: object = record["chosen"]
    rejected: object = record["rejected"]
    if type(chosen) is not type(rejected):
        raise TextsFileError(f"{where}: chosen and rejected must both be texts, or both lists of messages")
    if isinstance(chosen, list):
        before, better = _ending(cast("list[object]", chosen), "chosen", where)
        before_rejected, worse = _ending(rejected, "rejected", where)
        if before != before_rejected:
            raise TextsFileError(
                f"{where}: chosen and rejected differ before their last message; both must answer the same prompt"
            )
        return _prompt_of_messages(record, before, where), better, worse
    better, worse = read_text(chosen, "chosen", where), read_text(rejected, "rejected", where)
    prompt = _prompt(record, as_chat, where)
    if prompt is None:
        if as_chat:
            raise TextsFileError(f"{where}: prompt is missing; a chat cannot be told from its answer in plain text")
        shared = _shared_words(better, worse)
        prompt, better, worse = better[:shared], better[shared:], worse[shared:]
        if not better.strip() or not worse.strip():
            raise TextsFileError(f"{where}: chosen and rejected differ only in that one goes on after the other")
    return prompt, better, worse


def _single(record: dict[str, Any], as_chat: bool, where: str) -> tuple[Prompt, str]:
    responses = [name for name in ("text", "response", "completion") if name in record]
    if len(responses) > 1:
        raise TextsFileError(f"{where}: {' and '.join(responses)} both hold the text; give one of them")
    if not responses:
        if "messages" not in record or "prompt" in record:
            raise TextsFileError(f"{where}: text, response or messages is missing; it has {_names(record)}")
        before, response = _ending(record["messages"], "messages", where)
        return check_is_prompt(before, "messages", where), response
    name = responses[0]
    if name == "text":
        if "prompt" in record or "messages" in record:
            raise TextsFileError(f"{where}: text stands for itself; with a prompt, call it response")
        return "", read_text(record[name], name, where)
    if isinstance(record[name], list):
        before, response = _ending(record[name], name, where)
        return _prompt_of_messages(record, before, where), response
    prompt = _prompt(record, as_chat, where)
    if prompt is None:
        raise TextsFileError(f"{where}: prompt or messages is missing; a text that has none is called text")
    return prompt, read_text(record[name], name, where)


def _prompt(record: dict[str, Any], as_chat: bool, where: str) -> Prompt | None:
    """What a response in plain text answers; None where the record does not say."""
    if "prompt" in record and "messages" in record:
        raise TextsFileError(f"{where}: prompt and messages both hold the prompt; give one of them")
    if "messages" in record:
        return read_prompt_messages(record["messages"], "messages", where)
    if "prompt" not in record:
        return None
    prompt: object = record["prompt"]
    if isinstance(prompt, list):
        return read_prompt_messages(cast("list[object]", prompt), "prompt", where)
    text = read_text(prompt, "prompt", where)
    return ({"role": "user", "content": text},) if as_chat else text


def _prompt_of_messages(record: dict[str, Any], before: tuple[Message, ...], where: str) -> Prompt:
    """What messages answer: those before the last one, and those that the prompt holds by itself."""
    given = _prompt(record, True, where)
    if given is None:
        return check_is_prompt(before, "chosen", where)
    assert not isinstance(given, str)
    # Some sets keep the question beside whole conversations.
    if not before or given == before or (isinstance(record.get("prompt"), str) and given[0] in before):
        return before or given
    raise TextsFileError(f"{where}: the conversations do not begin with the prompt beside them; leave one of them out")


def _ending(value: object, field: str, where: str) -> tuple[tuple[Message, ...], str]:
    """The messages before the last one, and that one's text, which must be the assistant's."""
    messages = read_messages(value, field, where)
    if not messages or messages[-1]["role"] != "assistant":
        raise TextsFileError(f"{where}: {field}: the last message must be of the role assistant")
    return messages[:-1], messages[-1]["content"]


def _shared_words(a: str, b: str) -> int:
    """How many characters two texts share at their beginning, up to the last whole word and without space after it."""
    shared = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    while shared and not a[shared - 1].isspace():
        shared -= 1
    return len(a[:shared].rstrip())


def _scores(records: list[Record], good_label: str | None, origin: Origin) -> list[float]:
    """Of all lines, in one scale."""
    named = "label" if any("label" in record for _, record in records) else "score"
    values: list[Any] = []
    for number, record in records:
        where = origin.at(number)
        if "label" in record and "score" in record:
            raise TextsFileError(f"{where}: label and score both say how good the text is; give one of them")
        if named not in record:
            raise TextsFileError(f"{where}: {named} is missing; every text needs the same of label and score")
        values.append(record[named])
        if named == "score" and (isinstance(values[-1], bool) or not _is_finite(values[-1])):
            raise TextsFileError(f"{where}: score: must be a finite number; labels go into label")
        if named == "score" and abs(float(values[-1])) > MAX_SCORE:
            raise TextsFileError(f"{where}: score: must be from {-MAX_SCORE:g} to {MAX_SCORE:g}; scale all scores down")
        if named == "label" and not isinstance(values[-1], bool | int | str):
            raise TextsFileError(
                f"{where}: label: must be true or false, a whole number or a text; numbers of any kind go into score"
            )
        if named == "label" and type(values[-1]) is not type(values[0]):
            raise TextsFileError(f"{where}: label: is of another kind than in {origin.item(records[0][0])}")
    if named == "score":
        if good_label is not None:
            raise TextsFileError(f"{origin}: has scores and no labels, so leave --good-label out")
        return [float(value) for value in values]
    return _label_scores(values, [number for number, _ in records], good_label, origin)


def _label_scores(labels: list[Any], lines: list[int], good_label: str | None, origin: Origin) -> list[float]:
    distinct = list(dict.fromkeys(labels))
    if len(distinct) > 2:
        line = lines[labels.index(distinct[2])]
        raise TextsFileError(
            f"{origin.at(line)}: label: {distinct[2]!r} is a third one; there may be two, and score takes any number"
        )
    words = {json.dumps(label) if not isinstance(label, str) else label: label for label in distinct}
    if good_label is None:
        if any(isinstance(label, str) for label in distinct):
            raise TextsFileError(
                f"{origin}: the labels are {' and '.join(map(repr, words))}; say which one is wanted with --good-label"
            )
        good = max(distinct, default=None)
    elif good_label not in words:
        raise TextsFileError(
            f"{origin}: no text has the label {good_label!r} of --good-label; the labels are "
            f"{' and '.join(map(repr, words))}"
        )
    else:
        good = words[good_label]
    return [float(label == good) for label in labels]


def _is_finite(value: object) -> bool:
    try:
        return isinstance(value, int | float) and math.isfinite(float(value))
    except OverflowError:
        return False


def _kept(
    record: dict[str, Any], known: Sequence[str], needs: Sequence[Sequence[str]], ignore: Sequence[str], where: str
) -> dict[str, Any]:
    """The record without what is ignored. Raises TextsFileError for unknown fields, and where a needed one is."""
    if unknown := [name for name in record if name not in known and name not in ignore]:
        raise TextsFileError(
            f"{where}: unknown fields {', '.join(unknown)}; known are {', '.join(known)}, and --ignore-fields "
            f"{','.join(unknown)} leaves them out"
        )
    kept = {name: value for name, value in record.items() if name not in ignore}
    if any(isinstance(kept.get(name), str) for name in ("chosen", "response", "completion")):
        # Messages may begin with the prompt, but a text is not learnt from without what it answers.
        needs = (*needs, ("prompt", "messages"))
    for group in needs:
        ignored = [name for name in group if name in record]
        if ignored and not any(name in kept for name in group):
            raise TextsFileError(f"ignore_fields: {where} needs {' or '.join(ignored)}, which cannot be left out")
    return kept


def _names(record: dict[str, Any]) -> str:
    return ", ".join(record) or "no fields"


def _some(texts: list[GivenText], origin: Origin) -> list[GivenText]:
    if not texts:
        raise TextsFileError(f"{origin} is empty")
    return texts
