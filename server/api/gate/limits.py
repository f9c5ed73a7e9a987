"""What one caller may ask for: requests and tokens a minute, and requests at once.

Rates are token buckets that hold a minute's worth, so a caller may use it at once and then waits. A request pays for
its prompt and for all the tokens it may ask for, and gets back what it did not use; one that left open how many gets
what there is. Buckets are this process's own, or shared with other servers (`shared_rates.py`). Knows no HTTP. Enter at
`Callers`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from server.errors import InvalidRequestError, RateLimitError

MINUTE_S = 60.0
BYTES_READ_FOR_A_TOKEN = 64
"""Reading takes a thousandth of computing, and a token has some four bytes."""


@dataclass(slots=True, frozen=True)
class Limits:
    """None is no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None


@dataclass(slots=True, frozen=True)
class Taken:
    """What came of asking a bucket."""

    wait_s: float
    """0 when the amount was there and is taken; else the seconds until it will be there."""
    put_back: Callable[[float], None]
    """Gives some of it back to where it came from; returns at once."""


class Bucket(Protocol):
    """Fills up to `capacity` in a minute."""

    capacity: float

    async def take(self, amount: float) -> Taken: ...


class LocalBucket:
    """A bucket of this process. Without a capacity it never runs out."""

    def __init__(self, capacity: int | None, now_s: Callable[[], float]) -> None:
        self.capacity = math.inf if capacity is None else capacity
        self._level: float = self.capacity
        self._now_s = now_s
        self._updated_s = now_s()

    async def take(self, amount: float) -> Taken:
        wait_s = 0.0
        if not math.isinf(self.capacity):
            self._refill()
            if amount <= self._level:
                self._level -= amount
            else:
                wait_s = (amount - self._level) * MINUTE_S / self.capacity
        return Taken(wait_s, self._put_back)

    def _put_back(self, amount: float) -> None:
        self._level = min(self._level + amount, self.capacity)

    def _refill(self) -> None:
        now_s = self._now_s()
        self._put_back((now_s - self._updated_s) * self.capacity / MINUTE_S)
        self._updated_s = now_s


class Rates(Protocol):
    """Where buckets are kept."""

    def bucket(self, name: str, capacity: int | None) -> Bucket: ...


class LocalRates:
    """Buckets of this process."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s

    def bucket(self, name: str, capacity: int | None) -> LocalBucket:
        del name
        return LocalBucket(capacity, self._now_s)


class Caller:
    """One key's use of the server."""

    def __init__(self, key_id: str, limits: Limits, rates: Rates) -> None:
        self.key_id = key_id
        self.num_running = 0
        self._limits = limits
        self._requests = rates.bucket(f"{key_id}:requests", limits.requests_per_minute)
        self._tokens = rates.bucket(f"{key_id}:tokens", limits.tokens_per_minute)

    async def begin(self) -> None:
        """Count a request in; `end` must follow. Raises RateLimitError, which counts nothing."""
        most = self._limits.concurrent_requests
        if most is not None and self.num_running >= most:
            raise RateLimitError(f"{self.num_running} requests of this key run already; at most {most} may at once.")
        # Counted before the rate is asked for, which takes time: others must not pass meanwhile.
        self.num_running += 1
        try:
            taken = await self._requests.take(1)
            if taken.wait_s:
                raise _rate_error(f"{self._requests.capacity} requests a minute", taken.wait_s)
        except BaseException:
            self.num_running -= 1
            raise

    def end(self) -> None:
        self.num_running -= 1

    async def pay(
        self, tokens: int, *, least: int | None = None, field: str = "max_tokens", paid: Charge | None = None
    ) -> Charge:
        """Pay for tokens in advance, or, down to `least`, for as many as there are.

        What was `paid` for reading them is part of it. Raises RateLimitError, or for more than a minute's worth
        InvalidRequestError, which names `field`; what was paid before is then gone.
        """
        capacity, least = self._tokens.capacity, tokens if least is None else least
        if least > capacity:
            raise InvalidRequestError(
                f"{field}: prompt and new tokens are {least}; this key may use {capacity} a minute", param=field
            )
        held = 0 if paid is None else paid.tokens
        amount = math.floor(min(tokens, capacity))
        taken = await self._tokens.take(max(amount - held, 0))
        if taken.wait_s and least < amount:
            amount = max(math.floor(amount - taken.wait_s * capacity / MINUTE_S), least)
            taken = await self._tokens.take(max(amount - held, 0))
        if taken.wait_s:
            raise _rate_error(f"{capacity} tokens a minute", taken.wait_s)
        if paid is not None:
            paid.settle(held)
        return Charge(max(amount, held), taken.put_back)

    async def pay_reading(self, num_bytes: int) -> Charge:
        """Pay for the reading of so many bytes into tokens, before it is done. Raises RateLimitError."""
        amount = math.floor(min(math.ceil(num_bytes / BYTES_READ_FOR_A_TOKEN), self._tokens.capacity))
        taken = await self._tokens.take(amount)
        if taken.wait_s:
            raise _rate_error(f"{self._tokens.capacity} tokens a minute", taken.wait_s)
        return Charge(amount, taken.put_back)


class Charge:
    """Tokens that a request has paid for in advance, until it is settled once."""

    def __init__(self, tokens: int, put_back: Callable[[float], None]) -> None:
        self.tokens = tokens
        self._put_back = put_back
        self._is_settled = False

    def settle(self, used: int) -> None:
        """Give back what was not used; nothing happens when it is repeated."""
        if not self._is_settled:
            self._is_settled = True
            if used != self.tokens:
                self._put_back(self.tokens - used)


class Callers:
    """All callers by the id of their key. The ids come from the configured keys, so there is a bounded number."""

    def __init__(self, limits: Limits, rates: Rates) -> None:
        self._limits = limits
        self._rates = rates
        self._callers: dict[str, Caller] = {}

    def get(self, key_id: str) -> Caller:
        if key_id not in self._callers:
            self._callers[key_id] = Caller(key_id, self._limits, self._rates)
        return self._callers[key_id]


def _rate_error(what: str, wait_s: float) -> RateLimitError:
    retry_after_s = max(math.ceil(wait_s), 1)
    return RateLimitError(f"This key may use {what}; try again in {retry_after_s} s.", retry_after_s=retry_after_s)
