"""Sends one planned request over HTTP as its plan says, leaves where the plan says so, and keeps what came back.

It sends a request again as OpenAI's clients do: after 429 and 503, after a time in which nothing came, and where a
connection breaks before anything did. Knows nothing of what should have come back (judge.py). Enter at `Client.ask`.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Self

import httpx

from tests.soak.plan import Planned
from tests.soak.seen import BUSY, Seen
from tests.soak.slow import Crowd, exchange

MAX_CONNECTIONS = 96
"""Of the soaked server: more than there are clients, and as many as a crowd has."""
_TIMEOUT_S = 120.0
"""Far beyond what any request takes: one that is not answered by then is lost."""
_MOST_RETRIES = 200
_NUM_IMPATIENT = 2
"""Times that a client which retries waits only a while."""
_CROWD_S = 0.5
_BACKOFF_S = 0.1
_NO_LIMIT = httpx.Limits(max_connections=None, max_keepalive_connections=None)


class Client:
    """Of one server, with a key of its own."""

    def __init__(self, url: str, key: str) -> None:
        self._url = url
        self._http = httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_S, limits=_NO_LIMIT)
        self._authorization = {"authorization": f"Bearer {key}"}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def ask(self, planned: Planned, request_id: str) -> Seen:
        """Send it, and again while it has to be."""
        if planned.fault != "crowd":
            return await self._until_answered(planned, request_id)
        async with Crowd(self._url, MAX_CONNECTIONS, self._authorization).held():
            asking = asyncio.create_task(self._until_answered(planned, request_id))
            await asyncio.sleep(_CROWD_S)
        return await asking

    async def _until_answered(self, planned: Planned, request_id: str) -> Seen:
        retried: Counter[str] = Counter()
        statuses: list[int] = []
        unheard: list[str] = []
        while True:
            seen = await self._once(planned, f"{request_id}-{retried.total()}", retried["timeout"])
            statuses += [] if seen.status is None else [seen.status]
            reason = _reason_to_retry(planned, seen)
            if reason is None or retried.total() >= _MOST_RETRIES:
                seen.retried, seen.statuses, seen.unheard = retried, statuses, unheard
                return seen
            unheard += [seen.request_id] if reason == "broken" else []
            retried[reason] += 1
            await asyncio.sleep(float(seen.headers.get("retry-after", _BACKOFF_S)))

    async def _once(self, planned: Planned, request_id: str, num_timeouts: int) -> Seen:
        seen = Seen(request_id=request_id)
        method, path, content, headers = self._request(planned, request_id)
        if planned.pace is not None:
            seen = await exchange(self._url, method, path, content, headers, pace=planned.pace, timeout_s=_TIMEOUT_S)
            seen.request_id = request_id
            return seen
        patience_s = None
        if planned.fault == "cancel" or (planned.fault == "retry" and num_timeouts < _NUM_IMPATIENT):
            patience_s = planned.leave_after
        leave_after = int(planned.leave_after) if planned.fault == "disconnect" else None
        try:
            async with asyncio.timeout(patience_s):
                await self._fetch(seen, method, path, content, headers, leave_after=leave_after)
        except TimeoutError:
            seen.has_left = True
        return seen

    def _request(self, planned: Planned, request_id: str) -> tuple[str, str, bytes, dict[str, str]]:
        """Method, path, body and headers."""
        headers = {"content-type": "application/json", "x-request-id": request_id, **self._authorization}
        if (bad := planned.refused) is None:
            return "POST", planned.path, json.dumps(planned.body).encode(), headers
        own = headers if bad.has_key else {"x-request-id": request_id}
        return bad.method, bad.path, bad.content, {**own, **bad.headers}

    async def _fetch(
        self,
        seen: Seen,
        method: str,
        path: str,
        content: bytes,
        headers: dict[str, str],
        *,
        leave_after: int | None = None,
    ) -> None:
        """`leave_after` is the number of events after which the client hangs up."""
        try:
            async with self._http.stream(method, path, content=content, headers=headers) as response:
                seen.status, seen.headers = response.status_code, dict(response.headers)
                if not seen.is_stream:
                    seen.take((await response.aread()).decode())
                    return
                async for line in response.aiter_lines():
                    seen.take_line(line)
                    if leave_after is not None and len(seen.events) >= leave_after:
                        seen.has_left = True
                        return
        except httpx.HTTPError as error:
            seen.error = repr(error)


def _reason_to_retry(planned: Planned, seen: Seen) -> str | None:
    """None for an answer, whatever it is, and for a client that has gone for good."""
    if planned.fault == "retry" and seen.has_left:
        return "timeout"
    if seen.has_left:
        return None
    if seen.status is None and seen.error is not None and "Timeout" not in seen.error:
        may_hang_up = planned.refused is not None and planned.refused.may_hang_up
        return None if may_hang_up else "broken"
    # A refusal has to say when to come back; one that does not is judged as it is.
    if seen.status in BUSY and seen.headers.get("retry-after", "").isdecimal():
        return str(seen.status)
    return None
