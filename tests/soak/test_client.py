"""The soak's clients: what they send again, and how slow they are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from fastapi import FastAPI

from tests.api.conftest import make_app, serving  # noqa: F401
from tests.soak.client import Client
from tests.soak.plan import Pace, Planned
from tests.soak.seen import Seen

BODY = {"model": "fake", "prompt": "hi", "max_tokens": 3}
OK = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"
BUSY = "HTTP/1.1 {} Busy\r\nretry-after: 0\r\ncontent-length: 0\r\n\r\n"


@asynccontextmanager
async def answering(*answers: str | None) -> AsyncIterator[str]:
    """A server that gives these in turn, each on a connection of its own; None never comes."""
    left = list(answers)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}")
        if (given := left.pop(0)) is None:
            await reader.read()
        else:
            writer.write(given.encode())
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def ask(url: str, planned: Planned) -> Seen:
    async with Client(url, "key") as client:
        return await client.ask(planned, "r")


async def test_a_client_sends_again_what_was_refused_for_now_or_never_arrived() -> None:
    async with answering("", BUSY.format(429), BUSY.format(503), OK) as url:
        seen = await ask(url, Planned(0, "/v1/completions", BODY))
    assert (seen.status, seen.body, seen.request_id) == (200, "{}", "r-3")
    assert (seen.retried, seen.statuses) == ({"broken": 1, "429": 1, "503": 1}, [429, 503, 200])
    assert seen.unheard == ["r-0"]


async def test_a_client_that_retries_gives_up_twice_and_then_waits() -> None:
    async with answering(None, None, OK) as url:
        seen = await ask(url, Planned(0, "/v1/completions", BODY, "retry", leave_after=0.05))
    assert (seen.status, seen.retried, seen.has_left) == (200, {"timeout": 2}, False)


async def test_a_refusal_that_does_not_say_when_to_come_back_is_an_answer() -> None:
    async with answering(BUSY.format(429).replace("retry-after", "x")) as url:
        assert (await ask(url, Planned(0, "/v1/completions", BODY))).status == 429


@pytest.mark.parametrize("pace", [Pace(body_s=0.02), Pace(unread_s=0.1)], ids=["slow body", "late reader"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_slow_client_gets_the_same_answer(
    make_app: Callable[..., FastAPI],  # noqa: F811
    pace: Pace,
    stream: bool,
) -> None:
    body = {**BODY, "stream": stream, "seed": 1, "max_tokens": 40}
    with serving(make_app()) as url:
        plain, slow = [await ask(url, Planned(0, "/v1/completions", body, pace=p)) for p in (None, pace)]
    assert (slow.status, slow.error, slow.strays) == (200, None, [])
    assert len(slow.events) == len(plain.events)
    assert len(slow.body) == len(plain.body)


async def test_a_body_that_stops_coming_gets_its_refusal(make_app: Callable[..., FastAPI]) -> None:  # noqa: F811
    with serving(make_app(settings={"receive_timeout_s": 0.2})) as url:
        seen = await ask(url, Planned(0, "/v1/completions", BODY, pace=Pace(is_body_cut=True)))
    assert (seen.status, "request_timeout" in seen.body) == (408, True)


async def test_in_a_crowd_a_client_comes_again_until_there_is_room(make_app: Callable[..., FastAPI]) -> None:  # noqa: F811
    with serving(make_app(), max_connections=96) as url:
        seen = await ask(url, Planned(0, "/v1/completions", BODY, "crowd"))
    assert seen.status == 200
    assert seen.retried.keys() <= {"503", "broken"}
    assert seen.retried
