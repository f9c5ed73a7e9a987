"""Sends one planned request over HTTP as its plan says, leaves where the plan says so, and keeps what came back.

Knows nothing of what should have come back (judge.py). Enter at `Client.ask`.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any, Self

import httpx

from tests.soak.plan import Planned

_TIMEOUT_S = 300.0
"""Far beyond what any request takes: one that is not answered by then is lost."""
_MOST_RETRIES = 200
_NO_LIMIT = httpx.Limits(max_connections=None, max_keepalive_connections=None)


@dataclass(slots=True)
class Seen:
    """What one client saw."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: str = ""
    """Of an answer that came whole."""
    events: list[str] = field(default_factory=list)
    """Of a stream: what stands behind each `data: `."""
    strays: list[str] = field(default_factory=list)
    """Lines of a stream that are no events."""
    has_left: bool = False
    """The client went before the end, as planned."""
    error: str | None = None
    """The connection broke, or nothing came in time."""
    num_refused: int = 0
    """Answers 429, after each of which the request was sent again."""

    @property
    def is_stream(self) -> bool:
        return self.headers.get("content-type", "").startswith("text/event-stream")


class Client:
    """Of one server, with a key of its own."""

    def __init__(self, url: str, key: str) -> None:
        self._http = httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_S, limits=_NO_LIMIT)
        self._authorization = {"authorization": f"Bearer {key}"}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def ask(self, planned: Planned, request_id: str) -> Seen:
        """Send it, and again after each 429, as OpenAI's clients do."""
        num_refused = 0
        while True:
            seen = await self._once(planned, f"{request_id}-{num_refused}")
            seen.num_refused = num_refused
            if seen.status != httpx.codes.TOO_MANY_REQUESTS or num_refused >= _MOST_RETRIES or _problem_429(seen):
                return seen
            num_refused += 1
            await asyncio.sleep(float(seen.headers["retry-after"]))

    async def post(self, path: str, body: dict[str, Any], request_id: str) -> Seen:
        """One request to its end, whatever it asks for."""
        seen = Seen()
        await self._fetch(seen, "POST", path, json.dumps(body).encode(), self._headers(request_id))
        return seen

    async def _once(self, planned: Planned, request_id: str) -> Seen:
        seen = Seen()
        headers = self._headers(request_id)
        if (bad := planned.refused) is not None:
            own = headers if bad.has_key else {"x-request-id": request_id}
            await self._fetch(seen, bad.method, bad.path, bad.content, {**own, **bad.headers})
            return seen
        content = json.dumps(planned.body).encode()
        if planned.fault == "cancel":
            try:
                async with asyncio.timeout(planned.leave_after):
                    await self._fetch(seen, "POST", planned.path, content, headers)
            except TimeoutError:
                seen.has_left = True
            return seen
        leave_after = int(planned.leave_after) if planned.fault == "disconnect" else None
        await self._fetch(seen, "POST", planned.path, content, headers, leave_after=leave_after)
        return seen

    def _headers(self, request_id: str) -> dict[str, str]:
        return {"content-type": "application/json", "x-request-id": request_id, **self._authorization}

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
                    seen.body = (await response.aread()).decode()
                    return
                async for line in response.aiter_lines():
                    if line.startswith("data: "):
                        seen.events.append(line.removeprefix("data: "))
                    elif line:
                        seen.strays.append(line)
                    if leave_after is not None and len(seen.events) >= leave_after:
                        seen.has_left = True
                        return
        except httpx.HTTPError as error:
            seen.error = repr(error)


def _problem_429(seen: Seen) -> bool:
    """Whether the refusal does not say, as it must, when to come back."""
    return not seen.headers.get("retry-after", "").isdecimal()
