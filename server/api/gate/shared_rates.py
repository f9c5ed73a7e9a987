"""Rates that several servers count together, in a Redis server. Needs the extra `redis`; imported only when it is set.

A bucket is one hash in Redis, changed by a script that Redis runs as a whole and by its own clock, so that neither a
race nor a wrong clock of a server matters. It is gone once it is full, after a minute without use. While Redis cannot
be used each server counts for itself, as if it were alone: an outage neither stops requests nor lifts the limits. Knows
no HTTP. Enter at `SharedRates`.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from server.api.gate.limits import MINUTE_S, Bucket, LocalBucket, Taken
from server.errors import ConfigurationError

_log = logging.getLogger(__name__)
_PREFIX = "recontrol:rate:"
_TIMEOUT_S = 0.5
"""That a request waits for Redis at most; `socket_timeout` in the URL's query says otherwise."""
_PAUSE_S = 5.0
"""Without Redis after it failed, so that not every request waits for it."""
_MAX_CONNECTIONS = 16
# As LocalBucket.take. A negative amount puts back. Seventeen digits keep a double, of which Lua writes fourteen.
_TAKE = """
local capacity, amount, minute_s = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local time = redis.call('TIME')
local now_s = tonumber(time[1]) + tonumber(time[2]) / 1000000
local kept = redis.call('HMGET', KEYS[1], 'level', 'updated_s')
local elapsed_s = math.max(now_s - (tonumber(kept[2]) or now_s), 0)
local level = math.min((tonumber(kept[1]) or capacity) + elapsed_s * capacity / minute_s, capacity)
local wait_s = 0
if amount > level then
  wait_s = (amount - level) * minute_s / capacity
else
  level = math.min(level - amount, capacity)
end
redis.call('HSET', KEYS[1], 'level', string.format('%.17g', level), 'updated_s', string.format('%.17g', now_s))
redis.call('EXPIRE', KEYS[1], minute_s)
return string.format('%.17g', wait_s)
"""


class SharedRates:
    """Buckets that all servers with the same URL share. Harmless to close when nothing was asked."""

    def __init__(self, url: str) -> None:
        """Raises ConfigurationError, which never shows the URL: it may hold a password."""
        self._redis = Redis.from_pool(_pool(url))
        self._script = self._redis.register_script(_TAKE)
        self._is_used = True
        self._again_at_s = 0.0
        self._putting_back: set[asyncio.Task[None]] = set()

    def bucket(self, name: str, capacity: int | None) -> Bucket:
        local = LocalBucket(capacity, time.monotonic)
        return local if capacity is None else _SharedBucket(self, name, capacity, local)

    async def check(self) -> None:
        """Say in the log whether Redis can be used, before the first request asks."""
        if await self.take("check", 1, 0) is not None:
            _log.info("Rates are counted together with the other servers that use the same Redis")

    async def take(self, name: str, capacity: float, amount: float) -> float | None:
        """Seconds to wait, 0 when the amount is taken; None when Redis cannot be used."""
        if time.monotonic() < self._again_at_s:
            return None
        try:
            wait_s = float(await self._script(keys=[_PREFIX + name], args=[capacity, amount, int(MINUTE_S)]))
        except (RedisError, OSError) as error:
            if self._is_used:
                _log.warning("Redis cannot be used for rates (%s); until it can, this server counts alone", error)
            self._is_used = False
            self._again_at_s = time.monotonic() + _PAUSE_S
            return None
        if not self._is_used:
            _log.warning("Redis can be used again; rates are counted together")
        self._is_used = True
        return wait_s

    def put_back(self, name: str, capacity: float, amount: float) -> None:
        """Soon, and not before this returns: whoever puts back may be about to be cancelled."""
        task = asyncio.create_task(self._put_back(name, capacity, amount))
        self._putting_back.add(task)
        task.add_done_callback(self._putting_back.discard)

    async def _put_back(self, name: str, capacity: float, amount: float) -> None:
        await self.take(name, capacity, -amount)

    async def close(self) -> None:
        """Once everything is put back."""
        await asyncio.gather(*self._putting_back)
        await self._redis.aclose()


def _pool(url: str) -> BlockingConnectionPool:
    """Raises ConfigurationError."""
    try:
        parts = urlsplit(url)
        if parts.fragment or (parts.scheme != "unix" and not re.fullmatch(r"(/\d*)?", parts.path, re.ASCII)):
            raise ValueError  # The client would take database 0.
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=_MAX_CONNECTIONS,
            timeout=_TIMEOUT_S,
            socket_timeout=_TIMEOUT_S,
            socket_connect_timeout=_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        )
        # Finds what the URL asks for in vain; nothing is connected yet.
        pool.make_connection()
    except (ValueError, TypeError, RedisError) as error:
        raise ConfigurationError(
            "rate_limit_storage: not a URL of Redis; allowed are redis://[[user]:password@]host[:port][/database], the "
            "same with rediss:// for TLS, and unix:///path"
        ) from error
    return pool


class _SharedBucket:
    def __init__(self, rates: SharedRates, name: str, capacity: int, local: LocalBucket) -> None:
        self.capacity: float = capacity
        self._rates = rates
        self._name = name
        self._local = local

    async def take(self, amount: float) -> Taken:
        wait_s = await self._rates.take(self._name, self.capacity, amount)
        if wait_s is None:
            return await self._local.take(amount)
        return Taken(wait_s, lambda unused: self._rates.put_back(self._name, self.capacity, unused))
