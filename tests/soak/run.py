"""The soak itself: start the server, send the plan by many clients at once, and hold what came back against the law.

Afterwards some of the requests are run again, each alone, and must give the same. Knows nothing of tables (command.py).
Enter at `measure`.
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.speed.setup import ModelSetup
from tests.soak import judge
from tests.soak.client import Client, Seen
from tests.soak.plan import Planned, World, make_plan
from tests.soak.watch import KEY, Logged, Metrics, SoakedServer, growth_bytes, read_log

_NUM_CLIENTS = 24
_COMPARED_SHARE = 0.06
_COMPARED_AT_LEAST = 20
_NUM_SAMPLES = 60
_WARM_UP = 2000
"""Requests in which memory may still grow: torch's libraries keep something for every shape of batch they first meet,
which on a tiny model takes so many. A shorter soak cannot tell that from a leak, and does not judge."""
_GROWTH_BYTES = 64 * 2**20
_GROWTH_FILES = 16
_IDLE_S = 30.0
_NUM_SHOWN = 30
_CLEAN_EXITS = (0, -signal.SIGTERM)


@dataclass(slots=True)
class _Load:
    """What becomes of the plan while it is sent."""

    problems: list[str] = field(default_factory=list)
    seen: dict[int, Seen] = field(default_factory=dict)
    """Of the requests that are compared later."""
    statuses: dict[str, int] = field(default_factory=dict)
    """Request id -> the status that its client saw last."""
    series: list[tuple[int, int]] = field(default_factory=list)
    """Requests that are over, and the server's memory then."""
    num_done: int = 0
    num_429: int = 0
    num_left: int = 0
    num_expired: int = 0


def measure(setup: ModelSetup, *, count: int, texts: Sequence[str]) -> dict[str, Any]:
    """Figures, with `failures`: what was wrong in words, empty when nothing was. Raises PeerError."""
    server = SoakedServer(setup)
    try:
        world = _world(server.wait_until_ready(), texts)
        plan = make_plan(setup.seed, count, world)
        result, statuses = asyncio.run(_soak(server, plan, setup.seed))
    finally:
        server.end()
    # The log is whole only now.
    failures = result.pop("failures") + _of_the_log(read_log(server.log), statuses, result["sequences_ended"])
    if server.exit_code not in _CLEAN_EXITS:
        failures.append(f"the server ended with {server.exit_code}")
    return {**result, "num_failures": len(failures), "failures": failures[:_NUM_SHOWN]}


def _world(answers: dict[str, Any], texts: Sequence[str]) -> World:
    base = answers["models"][0]
    heads = {head["name"]: (head["reward_mean"], head["reward_scale"]) for head in answers["heads"]}
    return World(base["id"], base["max_model_len"], heads, texts)


async def _soak(server: SoakedServer, plan: list[Planned], seed: int) -> tuple[dict[str, Any], dict[str, int]]:
    """Figures and failures, and the status that the client of each request saw."""
    before = server.num_files()
    compared = _chosen(plan, seed)
    load = _Load()
    started_s = time.monotonic()
    async with Client(server.url, KEY) as client:
        todo = iter(plan)
        await asyncio.gather(*(_work(todo, client, server, load, plan, compared) for _ in range(_NUM_CLIENTS)))
        seconds = time.monotonic() - started_s
        at_end = await _when_idle(server)
        same, mismatches = await _compare(client, plan, load, compared)
    last = await _when_idle(server)
    failures = load.problems + mismatches + _of_the_end(server, last, before, growth_bytes(load.series, _WARM_UP))
    figures = {
        "num_requests": len(plan),
        "by_kind": _counted(planned.kind for planned in plan),
        "features": _counted(feature for p in plan if p.refused is None for feature in p.features),
        "faults": _counted(planned.fault for planned in plan if planned.fault),
        "bad_input_kinds": len({p.refused.name for p in plan if p.refused is not None}),
        "num_left": load.num_left,
        "num_expired": load.num_expired,
        "num_429": load.num_429,
        "num_lost": len(load.problems),
        "num_compared": same + len(mismatches),
        "num_mismatches": len(mismatches),
        "sequences_ended": last.ended,
        "seconds": round(seconds, 1),
        "tokens_per_s": round(at_end.new_tokens / seconds, 1),
        "new_tokens": int(at_end.new_tokens),
        "rss_series": load.series,
        "rss_growth_bytes": growth_bytes(load.series, _WARM_UP),
        "rss_warm_up_requests": _WARM_UP,
        "at_end": {"running": last.running, "waiting": last.waiting, "kv_cache_usage": last.kv_cache_usage},
        "open_files": {"before": before, "after": server.num_files()},
        "failures": failures,
    }
    return figures, load.statuses


def _chosen(plan: list[Planned], seed: int) -> set[int]:
    """Those that are run again alone: served, of a fixed seed, whatever their clients did to them."""
    served = [planned.number for planned in plan if planned.refused is None]
    wanted = max(_COMPARED_AT_LEAST, int(_COMPARED_SHARE * len(plan)))
    return set(random.Random(seed + 1).sample(served, min(wanted, len(served))))


async def _work(
    todo: Iterator[Planned], client: Client, server: SoakedServer, load: _Load, plan: list[Planned], compared: set[int]
) -> None:
    """One client after another, until nothing is left to send."""
    every = max(1, len(plan) // _NUM_SAMPLES)
    for planned in todo:
        request_id = f"soak-{planned.number}"
        seen = await client.ask(planned, request_id)
        load.problems += [f"{request_id} ({planned.kind}): {problem}" for problem in judge.problems_of(planned, seen)]
        load.num_429 += seen.num_refused
        load.num_left += seen.has_left
        load.num_expired += planned.fault == "deadline" and _has_expired(seen)
        if seen.status is not None:
            load.statuses[f"{request_id}-{seen.num_refused}"] = seen.status
        if planned.number in compared and not _has_expired(seen):
            load.seen[planned.number] = seen
        load.num_done += 1
        if load.num_done % every == 0 and server.is_running:
            load.series.append((load.num_done, server.rss_bytes()))


def _has_expired(seen: Seen) -> bool:
    return seen.status == 504 or any('"deadline_exceeded"' in event for event in seen.events[-2:])


async def _when_idle(server: SoakedServer) -> Metrics:
    """The first scrape without a sequence, or the last one when there is none in time."""
    deadline = time.monotonic() + _IDLE_S
    while not (metrics := server.metrics()).is_idle and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    return metrics


async def _compare(client: Client, plan: list[Planned], load: _Load, compared: set[int]) -> tuple[int, list[str]]:
    """How many gave the same alone, and how the others differ."""
    same, mismatches = 0, []
    for number in sorted(compared & load.seen.keys()):
        planned, seen = plan[number], load.seen[number]
        if seen.status is None:
            continue
        again = Planned(number, planned.path, planned.alone())
        alone = await client.ask(again, f"solo-{number}")
        problems = judge.problems_of(again, alone)
        if not problems and (differs := _difference(planned, seen, again, alone)):
            problems = [differs]
        same += not problems
        mismatches += [f"solo-{number} ({planned.kind}): {problem}" for problem in problems]
    return same, mismatches


def _difference(planned: Planned, seen: Seen, again: Planned, alone: Seen) -> str | None:
    ours, solo = judge.answer_of(planned, seen), judge.answer_of(again, alone)
    return judge.difference(ours, solo, is_whole=not seen.has_left)


def _of_the_end(server: SoakedServer, last: Metrics, files_before: int, growth: int | None) -> list[str]:
    """What is left over when nobody asks for anything any more."""
    failures = []
    if not last.is_idle:
        failures.append(f"sequences are left: {last}")
    if (status := server.health()) != 200:
        failures.append(f"/health answers {status}")
    if growth is not None and growth > _GROWTH_BYTES:
        failures.append(f"memory grew by {growth / 2**20:.0f} MiB after the first {_WARM_UP} requests")
    if (files := server.num_files()) > files_before + _GROWTH_FILES:
        failures.append(f"{files} files and sockets are open, {files_before} were")
    return failures


def _of_the_log(logged: Logged, statuses: dict[str, int], ended: dict[str, int]) -> list[str]:
    """Each request has one line, with the status that its client saw; and as many sequences ended as were accepted."""
    lines = logged.statuses
    failures = [f"the log has: {line}" for line in logged.errors]
    failures += [f"{name} has {len(its)} lines in the log" for name, its in lines.items() if len(its) != 1]
    for name, status in statuses.items():
        if lines.get(name) != [status]:
            failures.append(f"{name} was answered {status}, and the log has {lines.get(name)}")
    if not logged.least_sequences <= sum(ended.values()) <= logged.most_sequences:
        accepted = f"{logged.least_sequences} to {logged.most_sequences}"
        failures.append(f"{sum(ended.values())} sequences ended, where {accepted} were accepted")
    return failures


def _counted(names: Iterator[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))
