"""Content is data: what users, assistants and tools wrote never becomes a control token, whatever it spells.

A chat template turns a conversation into one text, in which its own `<|im_end|>` and one that a user typed look the
same. So contents are rendered with a mark inside whatever spells a control token, which no template takes for one, and
the template's own control tokens, being all that are left, are then given to a tokenizer that knows them by other
names. What a template does with contents (trimming, JSON, looking for a word) it does as before. Knows nothing of
roles or requests. Enter at `control_tokens`.
"""

from __future__ import annotations

import itertools
import re
import secrets
from collections.abc import Callable, Collection, Mapping
from functools import cached_property, lru_cache
from typing import Any

from tokenizers import AddedToken, Tokenizer

from server.errors import InvalidRequestError

_BRACKETS = {("<", ">"), ("[", "]")}
_REWRITES = re.compile(r"replace|split|strip|lower|upper|join|regex|:\s*-?\d*\s*\]")
"""In a template that may take something out of a content, or change its letters."""


@lru_cache(maxsize=4)
def control_tokens(tokenizer: Any, template: str) -> ControlTokens:
    """Those of a tokenizer of transformers under one of its templates; neither may change any more."""
    return ControlTokens(tokenizer, template)


class ControlTokens:
    """The added tokens that structure a conversation: special ones, those that the template names, and such as are
    written like either. Words and blanks that were added to a vocabulary are text."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        self._tokenizer = tokenizer
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        added: dict[int, AddedToken] = self._backend.get_added_tokens_decoder()
        self._names = {
            token.content: token_id for token_id, token in added.items() if self._is_control(token, template)
        }
        self._ids = frozenset(self._names.values())
        self._pattern = re.compile(_longest_of(self._names) if self._names else "(?!)")
        self._any_start = re.compile(f"(?={self._pattern.pattern})")
        self._beginnings = {name[:end] for name in self._names for end in range(1, len(name))}
        self._ends = {name[start:] for name in self._names for start in range(1, len(name))}
        self._longest = max(map(len, self._names), default=0)
        self._first = re.compile(
            "|".join(re.escape(first) for first in sorted({name[0] for name in self._names})) or "(?!)"
        )
        self._harmless = next(letter for letter in map(chr, range(0xE000, 0xF8FF)) if not self._first.match(letter))
        """Of Unicode's private characters."""
        self.may_be_made = _REWRITES.search(template) is not None
        """Whether the template may make a control token of a content that spells none."""

    @property
    def names(self) -> Collection[str]:
        return self._names.keys()

    def marked(self, value: Any, mark: str, *, everywhere: bool = False) -> Any:
        """The same plain data with the mark, a word that nobody can have written, inside all that spells a control
        token, or could together with what a template puts beside it. Equal to `value` where there is nothing of the
        kind.

        With `everywhere` it is behind every character that a control token begins with.
        """
        return _changed(
            value,
            lambda text: self._marked_text(text, mark, everywhere=everywhere),
            lambda name: self._marked_text(name, mark, at_borders=False),
        )

    def disarmed(self, value: Any) -> Any:
        """The same plain data with another character for each that a control token begins with. Words alone are left,
        which templates compare."""

        def disarmed(text: str) -> str:
            return text if text.isidentifier() else self._first.sub(self._harmless, text)

        return _changed(value, disarmed, disarmed)

    def names_in(self, text: str) -> list[str]:
        """The control tokens that a text spells, in order."""
        return [match[0] for match in self._pattern.finditer(text)]

    @property
    def added_before(self) -> list[int]:
        """What the tokenizer adds before a text, such as BOS."""
        return self._added_around[0]

    def encode(self, rendered: str, mark: str | None = None, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a rendered conversation, whose contents were marked; without a mark none of them had to be.

        Raises InvalidRequestError where this tokenizer makes a control token of text whatever it is called.
        """
        expected = len(self.names_in(rendered))
        if mark is None:
            ids = self._tokenizer(rendered, add_special_tokens=False)["input_ids"]
        else:
            ids = self._encode_renamed(rendered, mark, "")
        if self._count(ids) != expected:
            # Text became a control token through a normalizer, or as a word of the model's own vocabulary.
            ids = self._encode_renamed(rendered, mark or self._break_name, self._break_name)
        if self._count(ids) != expected:
            raise InvalidRequestError(
                "messages: they spell a control token, which this model's tokenizer cannot tell from the token itself",
                param="messages",
            )
        before, behind = self._added_around if add_special_tokens else ([], [])
        return [*before, *ids, *behind]

    def _is_control(self, token: AddedToken, template: str) -> bool:
        name = token.content
        if len(name) < 2 or name.isspace() or token.single_word:
            return False
        if token.special or name.startswith("<|"):
            return True
        if name in template and not name.isalnum():
            return True
        return (name[0], name[-1]) in _BRACKETS and self._backend.model.token_to_id(name) is None

    def _marked_text(self, text: str, mark: str, *, at_borders: bool = True, everywhere: bool = False) -> str:
        places = {match.start() + 1 for match in (self._first if everywhere else self._any_start).finditer(text)}
        sizes = range(1, min(len(text) + 1, self._longest) if at_borders else 1)
        if any(text[:size] in self._ends for size in sizes):
            places.add(0)
        if any(text[-size:] in self._beginnings for size in sizes):
            places.add(len(text))
        if not places:
            return text
        cuts = [0, *sorted(places), len(text)]
        return mark.join(text[start:end] for start, end in itertools.pairwise(cuts))

    def _count(self, ids: list[int]) -> int:
        return sum(1 for token_id in ids if token_id in self._ids)

    def _encode_renamed(self, rendered: str, mark: str, in_place_of_mark: str) -> list[int]:
        tokenizer, renamed, own_ids = self._renamed
        text = self._pattern.sub(lambda match: renamed[match[0]], rendered).replace(mark, in_place_of_mark)
        # A batch lets other threads run meanwhile, as a text by itself does not.
        (encoding,) = tokenizer.encode_batch_fast([text], add_special_tokens=False)
        ids = (own_ids.get(token_id, token_id) for token_id in encoding.ids)
        return [token_id for token_id in ids if token_id is not None]

    @cached_property
    def _break_name(self) -> str:
        return f"<{secrets.token_hex(16)}>"

    @cached_property
    def _renamed(self) -> tuple[Tokenizer, dict[str, str], dict[int, int | None]]:
        """A tokenizer of the same model whose control tokens have names that nobody can have written; the names, and
        what the ids stand for that it has given anew, None for the break between two parts of a text."""
        nonce = secrets.token_hex(16)
        renamed = {name: f"<{nonce}.{token_id}>" for name, token_id in self._names.items()}
        tokenizer = Tokenizer(self._backend.model)
        for part in ("normalizer", "pre_tokenizer"):
            if getattr(self._backend, part) is not None:
                setattr(tokenizer, part, getattr(self._backend, part))
        added = self._backend.get_added_tokens_decoder()
        tokenizer.add_tokens(
            [
                AddedToken(
                    renamed.get(token.content, token.content), single_word=token.single_word, lstrip=token.lstrip,
                    rstrip=token.rstrip, normalized=token.normalized, special=token.special,
                )
                for token in added.values()
            ]
        )  # fmt: skip
        tokenizer.add_tokens([AddedToken(self._break_name, normalized=False)])
        own_ids: dict[int, int | None] = {}
        for token_id, token in added.items():
            own_ids[_id_of(tokenizer, renamed.get(token.content, token.content))] = token_id
        own_ids[_id_of(tokenizer, self._break_name)] = None
        return tokenizer, renamed, own_ids

    @cached_property
    def _added_around(self) -> tuple[list[int], list[int]]:
        """What the tokenizer adds before and behind a text."""
        plain, whole = (self._tokenizer("a", add_special_tokens=adds)["input_ids"] for adds in (False, True))
        starts = [i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain]
        start = starts[0] if plain and starts else len(whole)
        return whole[:start], whole[start + len(plain) :]


def _changed(value: Any, of_text: Callable[[str], str], of_name: Callable[[str], str]) -> Any:
    """Plain data with all of its texts and the names of its members changed; tuples are lists then."""
    if isinstance(value, str):
        return of_text(value)
    if isinstance(value, Mapping):
        return {of_name(name): _changed(each, of_text, of_name) for name, each in value.items()}
    return [_changed(each, of_text, of_name) for each in value] if isinstance(value, list | tuple) else value


def _id_of(tokenizer: Tokenizer, name: str) -> int:
    token_id = tokenizer.token_to_id(name)
    assert token_id is not None
    return token_id


def _longest_of(names: Mapping[str, int]) -> str:
    """A pattern of the longest name that begins at a place, by a tree of their characters: thousands of names cost a
    text no more than one does."""
    tree: dict[str, Any] = {}
    for name in names:
        node = tree
        for letter in name:
            node = node.setdefault(letter, {})
        node[""] = {}

    def pattern(node: dict[str, Any]) -> str:
        parts = [re.escape(letter) + pattern(below) for letter, below in node.items() if letter]
        if not parts:
            return ""
        if "" in node:
            return f"(?:{'|'.join(parts)})?"
        return parts[0] if len(parts) == 1 else f"(?:{'|'.join(parts)})"

    return pattern(tree)
