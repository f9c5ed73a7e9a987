"""Search by value: how a request has several continuations tried, of which the best is kept.

Only the wire format; the engine does it (`server/engines/embedded/candidates.py`). What is best is what the objective
says of the state behind a candidate's last token (`server/control/scores.py`). Knows nothing of models or heads. Enter
at `Blocks`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_CANDIDATES = 32
MAX_BLOCK_TOKENS = 4096


class Blocks(BaseModel):
    """Sample so many continuations of `block_tokens` tokens, keep the best by the objective, and go on from there.

    Candidate 0 of every block draws from the choice's own stream, candidate j from the one keyed by seed, choice and j;
    a number of a stream is keyed by the token's place in the response, so one candidate gives what no search gives.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    type: Literal["blocks"]
    candidates: Annotated[int, Field(ge=1, le=MAX_CANDIDATES)] = 4
    block_tokens: Annotated[int, Field(ge=1, le=MAX_BLOCK_TOKENS)] = 8
