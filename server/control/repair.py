"""What a guardrail does where a value falls below its bound: end the response, draw again, or end it with a text.

Only the wire format, whose texts /openapi.json shows; the engines do it (`server/engines/guard.py`). All of them can
hold back the last tokens of a text, so that nothing that is taken back is ever shown. Knows nothing of models. Enter at
`OnStop`; to add a way to end, write one class beside `Replace`.

Source: Ji et al. 2025, "Almost Surely Safe Alignment of Large Language Models at Inference-Time" (InferenceGuard draws
tokens again where its critic calls none of them safe).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, FiniteFloat, model_validator

from server.control.wire import WireModel

MAX_RETRIES = 16
MAX_HOLD_TOKENS = 256
MAX_STEP_GROWTH = 4.0
MAX_REPLACEMENT_CHARS = 4096
DEFAULT_REPLACEMENT = "[The rest of this response was withheld.]"

Replacement = Annotated[str, Field(min_length=1, max_length=MAX_REPLACEMENT_CHARS)]


class _OnStop(WireModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class Stop(_OnStop):
    """End the response there."""

    type: Literal["stop"] = "stop"
    hold_tokens: Annotated[int, Field(ge=0, le=MAX_HOLD_TOKENS)] = 0
    """Last tokens that are shown only when so many more have come; where the response ends they never are."""

    @property
    def ends_with(self) -> str | None:
        """The text that a broken bound leaves at the end, None for none."""
        return None


class Replace(_OnStop):
    """End the response there, and with a text."""

    type: Literal["replace"]
    hold_tokens: Annotated[int, Field(ge=0, le=MAX_HOLD_TOKENS)] = 8
    """Last tokens that are shown only when so many more have come; the text takes their place."""
    replacement: Replacement | None = None
    """By default the server's own text."""

    @property
    def ends_with(self) -> str | None:
        return self.replacement or DEFAULT_REPLACEMENT


class Retry(_OnStop):
    """Go back to the last token above the bound and draw again, from random numbers of the retry's own."""

    type: Literal["retry"]
    max_retries: Annotated[int, Field(ge=1, le=MAX_RETRIES)] = 4
    """In the whole response; what comes then is `then`."""
    step_growth: Annotated[FiniteFloat, Field(ge=1.0, le=MAX_STEP_GROWTH)] = 1.0
    """Each retry makes the step size so many times as large, for the rest of the response; budgets stay."""
    rewind_tokens: Annotated[int, Field(ge=1, le=MAX_HOLD_TOKENS)] = 1
    """Tokens above the bound that are taken back with those below it."""
    hold_tokens: Annotated[int, Field(ge=1, le=MAX_HOLD_TOKENS)] = 8
    """Last tokens that are shown only when so many more have come, at least `rewind_tokens`."""
    then: Literal["stop", "replace"] = "stop"
    """What ends the response when a bound is broken once more, or drawing again could change nothing."""
    replacement: Replacement | None = None
    """Of `then` replace; by default the server's own text."""

    @property
    def ends_with(self) -> str | None:
        return None if self.then == "stop" else self.replacement or DEFAULT_REPLACEMENT

    @model_validator(mode="after")
    def _fits(self) -> Retry:
        if self.hold_tokens < self.rewind_tokens:
            raise ValueError("hold_tokens must be rewind_tokens at least, since what was shown cannot be taken back")
        if self.replacement is not None and self.then != "replace":
            raise ValueError('replacement goes with "then": "replace" alone')
        return self


def _by_name(value: Any) -> Any:
    value = "stop" if value is None else value
    return {"type": value} if isinstance(value, str) else value


OnStop = Annotated[Stop | Retry | Replace, Field(discriminator="type"), BeforeValidator(_by_name)]
"""The type alone, as a string, is short for an object with nothing else; null is stop."""
