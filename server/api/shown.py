"""Figures and scored tokens as JSON has them, in every response format."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from server.types import TokenLogprob, TopLogprob

_MIN_LOGPROB = -9999.0


def shown(value: Any) -> Any:
    """Figures of heads as JSON has them: it has no NaN and no infinity, so null stands for both."""
    if isinstance(value, dict):
        return {name: shown(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [shown(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shown_logprob(logprob: float) -> float:
    """JSON has no -inf; -9999.0 stands for it, as in vLLM."""
    return max(logprob, _MIN_LOGPROB)


def shown_logprobs(scores: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Scored tokens as chats and responses have them."""
    return [{**_scored(score), "top_logprobs": [_scored(other) for other in score.top]} for score in scores]


def _scored(score: TokenLogprob | TopLogprob) -> dict[str, Any]:
    return {"token": score.text, "logprob": shown_logprob(score.logprob), "bytes": list(score.data)}
