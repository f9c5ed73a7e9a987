"""Calls are read out of a text while it grows, however it is cut into pieces.

What is told does not depend on the cuts. A call in a text that is free is told once it is complete, since only then
it is known to be one; what looked like a call and is none stays text. White space around calls belongs to neither. In
a text that a grammar holds to calls, arguments are told as they come. Enter at `CallRules.reader`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from server.calls.calls import MAX_CALLS, WHITESPACE, CallDelta, JsonScanner, MalformedError, Outcome, Region
from server.calls.formats import CallFormat
from server.calls.writers import Frame

_LEAST_OPENING = 2
"""Characters that begin what opens a call, beyond which it is taken for one until it turns out to be none."""
_MOST_READ_ANEW = 65_536
"""Characters behind openings of a text that opened no call, beyond which it is text: each is read once more."""


@dataclass(slots=True, frozen=True)
class CallRules:
    """What calls a text may hold."""

    format: CallFormat
    tools: Mapping[str, Any] = field(default_factory=dict)
    """The schemas of the tools' parameters by name; no other tool is called."""
    is_held: bool = False
    """Whether a grammar holds the whole text to calls, so that it is nothing else."""
    max_calls: int = MAX_CALLS
    """The text ends behind so many."""

    @property
    def markers(self) -> tuple[str, ...]:
        """Special tokens that must be seen in the text."""
        return self.format.markers

    def reader(self) -> CallReader:
        """Of one text."""
        return HeldReader(self) if self.is_held else FreeReader(self)


class CallReader(Protocol):
    num_calls: int
    """Those told so far, of which the last may be incomplete."""

    @property
    def is_in_call(self) -> bool:
        """Whether what comes next belongs to a call's syntax."""
        ...

    @property
    def is_full(self) -> bool:
        """Whether there are as many calls as there may be, all complete."""
        ...

    def add(self, text: str) -> tuple[str, tuple[CallDelta, ...]]:
        """What is text of it, and of calls."""
        ...

    def end(self) -> tuple[str, tuple[CallDelta, ...]]:
        """What is text, and of calls, of what was held back, where the text ends."""
        ...

    def copy(self) -> CallReader:
        """Another that goes on from here by itself."""
        ...


class FreeReader:
    """Of a text that may hold calls."""

    def __init__(self, rules: CallRules) -> None:
        self._rules = rules
        self._openers = dict(rules.format.openers)
        self._starts = dict(rules.format.starts)
        self._held = ""
        """Text that may open a call, or white space that may stand before one."""
        self._region: Region | None = None
        self._raw = ""
        """The region's own text, its opener included."""
        self.num_calls = 0
        self._num_read_anew = 0
        self._has_begun = False
        """Whether anything but white space has come."""
        self._follows_call = False

    @property
    def is_in_call(self) -> bool:
        # Where what opens a call is several tokens, the first of them are part of it already.
        return self._region is not None or self._open_suffix(self._held) >= _LEAST_OPENING

    @property
    def is_full(self) -> bool:
        return self.num_calls >= self._rules.max_calls

    def add(self, text: str) -> tuple[str, tuple[CallDelta, ...]]:
        out: list[str] = []
        deltas: list[CallDelta] = []
        while not self.is_full:
            rest = self._open(text, out) if self._region is None else self._read(text, out, deltas)
            if rest is None:
                break
            text = rest
        return "".join(out), tuple(deltas)

    def end(self) -> tuple[str, tuple[CallDelta, ...]]:
        out: list[str] = []
        deltas: list[CallDelta] = []
        if self._region is not None:
            try:
                outcome = self._region.end()
            except MalformedError:
                out.append(self._let_go(self._raw))
            else:
                self._tell(outcome, deltas)
                self._held = "" if self.is_full else outcome.rest
            self._region = None
        self._let_out(self._held, out)
        self._held = ""
        return "".join(out), tuple(deltas)

    def copy(self) -> FreeReader:
        other = copy.copy(self)
        other._region = copy.deepcopy(self._region, {id(self._rules.tools): self._rules.tools})
        return other

    def _open(self, text: str, out: list[str]) -> str | None:
        """Look for what opens a call; the text behind it, or None where nothing does yet."""
        held = self._held + text
        if not held:
            return None
        if not self._has_begun and (begin := held.lstrip(WHITESPACE)):
            self._has_begun = True
            for opener, make in self._starts.items():
                if begin.startswith(opener):
                    self._begin(make, held[: len(held) - len(begin)], raw="")
                    return begin
        found = [(at, opener) for opener in self._openers if (at := held.find(opener)) >= 0]
        at, opener = min(found, default=(-1, ""))
        if opener:
            before = held[:at]
            self._let_out(before.rstrip(WHITESPACE), out)
            self._begin(self._openers[opener], before[len(before.rstrip(WHITESPACE)) :], raw=opener)
            return held[at + len(opener) :]
        safe = len(held) - self._open_suffix(held)
        safe = len(held[:safe].rstrip(WHITESPACE))
        self._let_out(held[:safe], out)
        self._held = held[safe:]
        return None

    def _let_out(self, text: str, out: list[str]) -> None:
        if text:
            # White space behind a call belongs to neither.
            out.append(text.lstrip(WHITESPACE) if self._follows_call else text)
            self._follows_call = False

    def _begin(self, make: Any, space: str, *, raw: str) -> None:
        self._region = make(self._rules.tools)
        self._held, self._raw = space, raw

    def _read(self, text: str, out: list[str], deltas: list[CallDelta]) -> str | None:
        """Go on with the region; the text behind it, or None while it goes on."""
        assert self._region is not None
        self._raw += text
        try:
            outcome = self._region.feed(text)
        except MalformedError:
            # Behind what seemed to open a call there may be one all the same.
            self._region = None
            opener = next((known for known in self._openers if self._raw.startswith(known)), self._raw[:1])
            self._num_read_anew += len(self._raw)
            if self._num_read_anew > _MOST_READ_ANEW:
                self._openers = {}
            out.append(self._let_go(opener))
            return self._raw[len(opener) :]
        if outcome is None:
            return None
        self._region = None
        self._tell(outcome, deltas)
        return outcome.rest

    def _let_go(self, raw: str) -> str:
        """What seemed to be a call, as text, with the white space before it."""
        out: list[str] = []
        self._let_out(self._held + raw, out)
        self._held = ""
        return "".join(out)

    def _tell(self, outcome: Outcome, deltas: list[CallDelta]) -> None:
        for call in outcome.calls[: self._rules.max_calls - self.num_calls]:
            deltas += [CallDelta(self.num_calls, call.name), CallDelta(self.num_calls, arguments=call.arguments)]
            self.num_calls += 1
        self._held, self._follows_call, self._has_begun = "", True, True

    def _open_suffix(self, text: str) -> int:
        """Length of the longest end of a text that begins what opens a call."""
        longest = max(map(len, self._openers), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(opener.startswith(text[-length:]) for opener in self._openers):
                return length
        return 0


class HeldReader:
    """Of a text that is nothing but calls in a frame. What is out of it stays text."""

    def __init__(self, rules: CallRules) -> None:
        self._frame: Frame = rules.format.held_frame
        self._rules = rules
        self._held = ""
        self._lead = self._frame.first
        """What stands before the next call."""
        self._scanner: JsonScanner | None = None
        """Of the arguments that are being read."""
        self._is_behind_arguments = False
        self._is_broken = False
        self.num_calls = 0

    @property
    def is_in_call(self) -> bool:
        return not self._is_broken

    @property
    def is_full(self) -> bool:
        # The grammar ends the text.
        return False

    def add(self, text: str) -> tuple[str, tuple[CallDelta, ...]]:
        deltas: list[CallDelta] = []
        while text or self._held:
            if self._is_broken:
                out, self._held = self._held + text, ""
                return out, tuple(deltas)
            if self._scanner is not None:
                text = self._read_arguments(text, deltas)
                continue
            self._held += text
            text = ""
            step = self._leave if self._is_behind_arguments else self._enter
            if not step(deltas):
                break
        return "", tuple(deltas)

    def end(self) -> tuple[str, tuple[CallDelta, ...]]:
        rest, self._held = self._held, ""
        # In its frame it is the beginning of what ends a call, or of one whose name nobody knows yet.
        return rest if self._is_broken else "", ()

    def copy(self) -> HeldReader:
        other = copy.copy(self)
        other._scanner = copy.deepcopy(self._scanner)
        return other

    def _read_arguments(self, text: str, deltas: list[CallDelta]) -> str:
        """Tell those of this text; what is behind them."""
        assert self._scanner is not None
        try:
            end = self._scanner.feed(text)
        except MalformedError:
            self._is_broken = True
            return text
        if text:
            deltas.append(CallDelta(self.num_calls - 1, arguments=text[:end]))
        if end is None:
            return ""
        self._scanner, self._is_behind_arguments = None, True
        return text[end:]

    def _enter(self, deltas: list[CallDelta]) -> bool:
        """Whether a call's name has been read."""
        heads = list(self._heads())
        for name, head in heads:
            if self._held.startswith(head):
                deltas.append(CallDelta(self.num_calls, name))
                self.num_calls += 1
                self._scanner, self._lead = JsonScanner(), self._frame.separator
                rest, self._held = self._held[len(head) :], ""
                if rest:
                    self._held = self._read_arguments(rest, deltas)
                return True
        is_open = any(head.startswith(self._held) for _, head in heads)
        if not is_open and not (self.num_calls and self._frame.last.startswith(self._held)):
            self._is_broken = True
            return True
        return False

    def _leave(self, deltas: list[CallDelta]) -> bool:
        """Whether what ends a call has been read."""
        del deltas
        if self._held.startswith(self._frame.end):
            self._held = self._held[len(self._frame.end) :]
            self._is_behind_arguments = False
            return True
        self._is_broken = not self._frame.end.startswith(self._held)
        return self._is_broken

    def _heads(self) -> Iterator[tuple[str, str]]:
        for name in self._rules.tools:
            yield name, f"{self._lead}{self._frame.begin}{name}{self._frame.between}"
