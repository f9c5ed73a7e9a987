"""The grammar of a text with calls of tools, in llguidance's notation.

A special token is named by its id, since its letters alone are other tokens. Text that is free runs up to what begins
a call, by a lexeme that ends where it first can. Knows no tokenizer and no HTTP. Enter at `call_grammar`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping

from server.calls.structure import CallStructure

_ANY = r"TEXT: /(.|\n)*/"
_NO_OBJECT = r"PLAIN: /\s*[^\s{](.|\n)*/"


def call_grammar(
    structure: CallStructure, *, json_rule: Callable[[str], str], special_token_ids: Mapping[str, int]
) -> str:
    """`json_rule` makes a schema ready to stand behind `%json`."""
    frame = structure.frame

    def text(*parts: str) -> str:
        return " ".join(_terms("".join(parts), special_token_ids))

    rules = ['%llguidance {"no_forcing": true}']
    names = list(structure.schemas)
    more = f"({text(frame.separator)} call){{0,{structure.max_calls - 1}}}" if structure.max_calls > 1 else ""
    calls = f"{text(frame.first)} call {more} {text(frame.last)}"
    if structure.is_forced:
        rules.append(f"start: {calls}")
    elif structure.answer is not None:
        rules += [f"start: calls | %json {json_rule(structure.answer)}", f"calls: {calls}"]
    elif not frame.trigger:
        rules += ["start: calls | PLAIN | ", f"calls: {calls}", _NO_OBJECT]
    else:
        rules += ["start: (tag)* tail", "tail: TEXT", _ANY, *_tags(structure, text, more)]
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(names))))
    for i, name in enumerate(names):
        rules.append(f"call_{i}: {text(frame.begin, name, frame.between)} arguments_{i} {text(frame.end)}")
        rules.append(f"arguments_{i}: %json {json_rule(structure.schemas[name])}")
    return "\n".join(rules)


def opening(structure: CallStructure) -> str:
    """The text of a first call up to its first argument."""
    frame = structure.frame
    return f'{frame.first}{frame.begin}{next(iter(structure.schemas))}{frame.between}{{"'


def _tags(structure: CallStructure, text: Callable[..., str], more: str) -> Iterator[str]:
    """The rules of a text up to what begins a call, and that call; or, of a list of them, all."""
    frame = structure.frame
    trigger = text(frame.trigger)
    # A special token ends the text before it anyway.
    yield f"head{'' if trigger.startswith('<[') else '[lazy]'}: TEXT {trigger}"
    rest = (frame.first + frame.begin).removeprefix(frame.trigger)
    options = " | ".join(
        f"({text(rest, name, frame.between)} arguments_{i} {text(frame.end)})"
        for i, name in enumerate(structure.schemas)
    )
    yield f"tag: head ({options}) {f'{more} {text(frame.last)}' if frame.first else ''}"


def _terms(text: str, special_token_ids: Mapping[str, int]) -> Iterator[str]:
    """The text as literals and ids of special tokens."""
    names = "|".join(re.escape(name) for name in sorted(special_token_ids, key=len, reverse=True) if name)
    for part in re.split(f"({names})", text) if names else [text]:
        if part in special_token_ids:
            yield f"<[{special_token_ids[part]}]>"
        elif part:
            yield json.dumps(part)
