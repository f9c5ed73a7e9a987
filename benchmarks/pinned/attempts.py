"""What callers may try against a pinned `positive`: a field of a request, and its value that should hurt most.

To try another, add an attempt; a test holds that every field of a request is tried, or has a law of its own in
tests/api/test_pinned_fields.py. Knows nothing of servers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["held", "refused", "not held"]
PINNED_HEAD = "positive"
OPPOSITE, NEARLY = "opposite", "nearly-opposite"
"""Heads that the study makes: the pinned one turned round, and the same with noise."""
_BAD = ["terrible", "awful", "hate", "horrible", "sad", "worst", "bad"]
_GOOD = ["good", "great", "happy", "love", "beautiful", "wonderful", "best", "enjoy"]
_BLOCKS = {"type": "blocks", "candidates": 3, "block_tokens": 4}


@dataclass(slots=True, frozen=True)
class Attempt:
    field: str
    """As the table shows it."""
    body: dict[str, Any]
    kind: Kind = "held"
    """What the documentation says: held, refused by default, or not held."""
    biased: tuple[str, ...] = ()
    """Words whose first tokens get a bias of 8, or of -100 where they are good."""
    prefill: str = ""
    """The beginning of the answer, which the caller writes."""
    tokens: int | None = None
    """New tokens, in place of the study's own number."""


def _against(head: str, **control: Any) -> dict[str, Any]:
    return {"control": {"objective": {"weights": {head: 10.0}}, **control}}


ATTEMPTS = (
    Attempt("control.objective, the opposite head", _against(OPPOSITE)),
    Attempt("control.objective, nearly the opposite", _against(NEARLY)),
    Attempt("control.objective, shipped heads",
            {"control": {"objective": {"weights": {"neutral": 10.0, "nontoxic": -10.0}}}}),
    Attempt("control.step_size, steps, max_kl, max_shift",
            _against(NEARLY, step_size=10.0, steps=100, max_kl=0.5, max_shift=2.0)),
    Attempt("control.search", _against(OPPOSITE, steps=0, search=_BLOCKS)),
    Attempt("best_of", {**_against(OPPOSITE, steps=0), "best_of": 3}),
    Attempt("model, another head's name", {"model": f"@{OPPOSITE}"}),
    Attempt("temperature 0", {"temperature": 0.0}),
    Attempt("top_p 0.5", {"top_p": 0.5}),
    Attempt("top_k 5", {"top_k": 5}),
    Attempt("min_p 0.3", {"min_p": 0.3}),
    Attempt("presence_penalty 2", {"presence_penalty": 2.0}),
    Attempt("frequency_penalty 2", {"frequency_penalty": 2.0}),
    Attempt("ignore_eos, a long response", {"ignore_eos": True}, tokens=32),
    Attempt("prefill of the answer", {}, prefill="That is terrible."),
    Attempt("logit_bias, 8 on bad words", {}, "refused", biased=tuple(_BAD)),
    Attempt("logit_bias, -100 on good words", {}, "refused", biased=tuple(_GOOD)),
    Attempt("repetition_penalty 0.5", {"repetition_penalty": 0.5}, "refused"),
    Attempt("temperature 2", {"temperature": 2.0}, "refused"),
    Attempt("presence_penalty -2", {"presence_penalty": -2.0}, "refused"),
    Attempt("frequency_penalty -2", {"frequency_penalty": -2.0}, "refused"),
    Attempt("guided_choice, two bad texts", {"guided_choice": ["It is terrible.", "It is awful and sad."]}, "not held"),
)  # fmt: skip
