"""What one caller may ask for: requests and tokens a minute, and requests at once.

Rates are token buckets that hold a minute's worth, so a caller may use it at once and then waits. A request pays for
its prompt and for all the tokens it may ask for, and gets back what it did not use. Knows no HTTP. Enter at `Callers`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from server.errors import InvalidRequestError, RateLimitError

_MINUTE_S = 60.0


@dataclass(slots=True, frozen=True)
class Limits:
    """None is no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None


class Bucket:
    """Fills up to `capacity` in a minute. Without a capacity it never runs out."""

    def __init__(self, capacity: int | None, now_s: Callable[[], float]) -> None:
        self.capacity = math.inf if capacity is None else capacity
        self._level: float = self.capacity
        self._now_s = now_s
        self._updated_s = now_s()

    def take(self, amount: float) -> float:
        """0 when the amount was there and is taken; else the seconds until it will be there."""
        if math.isinf(self.capacity):
            return 0.0
        self._refill()
        if amount <= self._level:
            self._level -= amount
            return 0.0
        return (amount - self._level) * _MINUTE_S / self.capacity

    def put_back(self, amount: float) -> None:
        self._level = min(self._level + amount, self.capacity)

    def _refill(self) -> None:
        now_s = self._now_s()
        self.put_back((now_s - self._updated_s) * self.capacity / _MINUTE_S)
        self._updated_s = now_s


class Caller:
    """One key's use of the server."""

    def __init__(self, key_id: str, limits: Limits, now_s: Callable[[], float] = time.monotonic) -> None:
        self.key_id = key_id
        self.num_running = 0
        self._limits = limits
        self._requests = Bucket(limits.requests_per_minute, now_s)
        self._tokens = Bucket(limits.tokens_per_minute, now_s)

    def begin(self) -> None:
        """Count a request in; `end` must follow. Raises RateLimitError, which counts nothing."""
        most = self._limits.concurrent_requests
        if most is not None and self.num_running >= most:
            raise RateLimitError(f"{self.num_running} requests of this key run already; at most {most} may at once.")
        if wait_s := self._requests.take(1):
            raise _rate_error(f"{self._requests.capacity} requests a minute", wait_s)
        self.num_running += 1

    def end(self) -> None:
        self.num_running -= 1

    def charge(self, tokens: int, *, field: str = "max_tokens") -> None:
        """Pay for tokens in advance.

        Raises RateLimitError, or for more than a minute's worth InvalidRequestError, which names `field`.
        """
        if tokens > self._tokens.capacity:
            raise InvalidRequestError(
                f"{field}: prompt and new tokens are {tokens}; this key may use {self._tokens.capacity} a minute",
                param=field,
            )
        if wait_s := self._tokens.take(tokens):
            raise _rate_error(f"{self._tokens.capacity} tokens a minute", wait_s)

    def refund(self, tokens: int) -> None:
        self._tokens.put_back(tokens)


class Charge:
    """Tokens that a request has paid for in advance, until it is settled once."""

    def __init__(self, caller: Caller | None, tokens: int, *, field: str = "max_tokens") -> None:
        """Raises what `Caller.charge` does."""
        if caller is not None:
            caller.charge(tokens, field=field)
        self._caller = caller
        self._tokens = tokens

    def settle(self, used: int) -> None:
        """Give back what was not used; nothing happens when it is repeated."""
        caller, self._caller = self._caller, None
        if caller is not None:
            caller.refund(self._tokens - used)


class Callers:
    """All callers by the id of their key. The ids come from the configured keys, so there is a bounded number."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._callers: dict[str, Caller] = {}

    def get(self, key_id: str) -> Caller:
        if key_id not in self._callers:
            self._callers[key_id] = Caller(key_id, self._limits)
        return self._callers[key_id]


def _rate_error(what: str, wait_s: float) -> RateLimitError:
    retry_after_s = max(math.ceil(wait_s), 1)
    return RateLimitError(f"This key may use {what}; try again in {retry_after_s} s.", retry_after_s=retry_after_s)
