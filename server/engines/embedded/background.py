"""What may run in the engine's spare rows, beside requests and behind them: texts that a head is trained on.

A sequence in the background is admitted only where no request waits, has rows and pages that no request wants, and
loses them to the first that does; it then begins anew, so nothing in it changes. While requests run, a step holds a few
of its tokens at most, and else as many as of requests. It neither uses nor fills the cache of prompts, and what
observers count is requests alone. Knows nothing of what is trained. `Scheduler` asks here.
"""

from __future__ import annotations

from collections.abc import Iterable

from server.engines.embedded.sequence import Sequence
from server.engines.embedded.shares import Budget

BESIDE_REQUESTS = 8
"""Tokens of the background in a step that has requests: on a CPU a row of eight costs a fifth more than one alone."""


def of_requests(running: Iterable[Sequence]) -> list[Sequence]:
    return [sequence for sequence in running if not sequence.is_background]


def in_background(running: Iterable[Sequence]) -> list[Sequence]:
    return [sequence for sequence in running if sequence.is_background]


def shared_budget(left: Budget) -> Budget:
    """Of what requests leave of a step."""
    left.tokens = min(left.tokens, BESIDE_REQUESTS)
    return left
