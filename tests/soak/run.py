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
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.speed.setup import ModelSetup
from tests.soak import judge
from tests.soak.answers import answer_of, difference
from tests.soak.bodies import World
from tests.soak.client import Client
from tests.soak.plan import Planned, make_plan
from tests.soak.seen import Seen
from tests.soak.watch import KEY, Held, Logged, Metrics, SoakedServer, growth_bytes, read_log

_NUM_CLIENTS = 24
_COMPARED_SHARE = 0.06
_COMPARED_AT_LEAST = 20
_NUM_SAMPLES = 60
_WARM_UP = 2000
"""Requests in which memory may still grow: torch's libraries keep something for every shape of batch they first meet,
which on a tiny model takes so many. A shorter soak cannot tell that from a leak, and does not judge."""
_GROWTH_BYTES = 64 * 2**20
_GROWTH_FILES = 16
_GROWTH_THREADS = 32
"""Pools of threads grow to their size when they are first needed."""
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
    answered: Counter[str] = field(default_factory=Counter)
    """Every answer, by its status."""
    retried: Counter[str] = field(default_factory=Counter)
    """Requests that were sent again, by the reason."""
    unheard: list[str] = field(default_factory=list)
    """Ids of requests that the server cannot have seen."""
    series: list[tuple[int, int]] = field(default_factory=list)
    """Requests that are over, and the server's memory then."""
    num_done: int = 0
    num_left: int = 0
    num_expired: int = 0


def measure(setup: ModelSetup, *, count: int, texts: Sequence[str], most_s: float) -> dict[str, Any]:
    """Figures, with `failures`: what was wrong in words, empty when nothing was. Raises PeerError.

    What has not begun after `most_s` seconds is not sent, which is a failure too.
    """
    server = SoakedServer(setup)
    try:
        world = _world(server.wait_until_ready(), texts)
        plan = make_plan(setup.seed, count, world)
        result, load = asyncio.run(_soak(server, plan, setup.seed, time.monotonic() + most_s))
    finally:
        server.end()
    # The log is whole only now.
    logged = read_log(server.log)
    failures = result.pop("failures") + _of_the_log(logged, load, result["sequences_ended"])
    result["num_let_go"] = logged.num_let_go
    if server.exit_code not in _CLEAN_EXITS:
        failures.append(f"the server ended with {server.exit_code}")
    return {**result, "num_failures": len(failures), "failures": failures[:_NUM_SHOWN]}


def _world(answers: dict[str, Any], texts: Sequence[str]) -> World:
    base = answers["models"][0]
    heads = {head["name"]: (head["reward_mean"], head["reward_scale"]) for head in answers["heads"]}
    return World(base["id"], base["max_model_len"], heads, texts)


async def _soak(server: SoakedServer, plan: list[Planned], seed: int, due_s: float) -> tuple[dict[str, Any], _Load]:
    """Figures and failures, and what became of the plan."""
    before = server.held()
    compared = _chosen(plan, seed)
    load = _Load()
    started_s = time.monotonic()
    async with Client(server.url, KEY) as client:
        todo = iter(plan)
        workers = (_work(todo, client, server, load, plan, compared, due_s) for _ in range(_NUM_CLIENTS))
        await asyncio.gather(*workers)
        seconds = time.monotonic() - started_s
        at_end = await _when_idle(server)
        same, mismatches = await _compare(client, plan, load, compared, due_s)
    last, after = await _when_idle(server), server.held()
    growth = growth_bytes(load.series, _WARM_UP)
    failures = mismatches + load.problems + _of_the_end(server, last, before, after, growth)
    if (num_unsent := len(plan) - load.num_done) > 0:
        failures.append(f"{num_unsent} requests were not sent in time")
    figures = {
        "num_requests": len(plan),
        "num_clients": _NUM_CLIENTS,
        **_of_the_plan(plan),
        "by_status": dict(sorted(load.answered.items())),
        "retried": dict(sorted(load.retried.items())),
        "num_left": load.num_left,
        "num_expired": load.num_expired,
        "num_lost": len(load.problems),
        "num_compared": same + len(mismatches),
        "num_mismatches": len(mismatches),
        "sequences_ended": last.ended,
        "seconds": round(seconds, 1),
        "compared_s": round(time.monotonic() - started_s - seconds, 1),
        "tokens_per_s": round(at_end.new_tokens / seconds, 1),
        "new_tokens": int(at_end.new_tokens),
        "rss_series": load.series,
        "rss_growth_bytes": growth,
        "rss_warm_up_requests": _WARM_UP,
        "at_end": {"running": last.running, "waiting": last.waiting, "kv_cache_usage": last.kv_cache_usage},
        "held_before": asdict(before),
        "held_after": asdict(after),
        "failures": failures,
    }
    return figures, load


def _of_the_plan(plan: list[Planned]) -> dict[str, Any]:
    """What was sent, counted."""
    return {
        "by_kind": _counted(planned.kind for planned in plan),
        "features": _counted(feature for p in plan if p.refused is None for feature in p.features),
        "faults": _counted(planned.fault for planned in plan if planned.fault),
        "bad_input_kinds": len({p.refused.name for p in plan if p.refused is not None}),
    }


def _chosen(plan: list[Planned], seed: int) -> set[int]:
    """Those that are run again alone: served and read, of a fixed seed, whatever their clients did to them."""
    served = [planned.number for planned in plan if planned.refused is None and planned.fault != "unread"]
    wanted = max(_COMPARED_AT_LEAST, int(_COMPARED_SHARE * len(plan)))
    return set(random.Random(seed + 1).sample(served, min(wanted, len(served))))


async def _work(
    todo: Iterator[Planned],
    client: Client,
    server: SoakedServer,
    load: _Load,
    plan: list[Planned],
    compared: set[int],
    due_s: float,
) -> None:
    """One client after another, until nothing is left to send or the time is over."""
    every = max(1, len(plan) // _NUM_SAMPLES)
    for planned in todo:
        if time.monotonic() > due_s:
            return
        seen = await client.ask(planned, f"soak-{planned.number}")
        _count(load, planned, seen)
        if planned.number in compared and not judge.has_expired(seen):
            load.seen[planned.number] = seen
        if load.num_done % every == 0 and server.is_running:
            load.series.append((load.num_done, server.rss_bytes()))


def _count(load: _Load, planned: Planned, seen: Seen) -> None:
    """One more that is over."""
    problems = judge.problems_of(planned, seen)
    load.problems += [f"soak-{planned.number} ({planned.kind}): {problem}" for problem in problems]
    load.retried.update(seen.retried)
    load.unheard += seen.unheard
    load.answered.update(map(str, seen.statuses))
    load.answered["none"] += seen.status is None
    load.num_left += seen.has_left
    load.num_expired += planned.fault == "deadline" and judge.has_expired(seen)
    if seen.status is not None:
        load.statuses[seen.request_id] = seen.status
    load.num_done += 1


async def _when_idle(server: SoakedServer) -> Metrics:
    """The first scrape without a sequence, or the last one when there is none in time."""
    deadline = time.monotonic() + _IDLE_S
    while not (metrics := server.metrics()).is_idle and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    return metrics


async def _compare(
    client: Client, plan: list[Planned], load: _Load, compared: set[int], due_s: float
) -> tuple[int, list[str]]:
    """How many gave the same alone, and how the others differ."""
    same, mismatches = 0, []
    for number in sorted(compared & load.seen.keys()):
        planned, seen = plan[number], load.seen[number]
        if seen.status is None:
            continue
        if time.monotonic() > due_s:
            mismatches.append(f"solo-{number} and those behind it were not run in time")
            break
        again = Planned(number, planned.path, planned.alone())
        alone = await client.ask(again, f"solo-{number}")
        problems = judge.problems_of(again, alone)
        if not problems and (differs := _difference(planned, seen, again, alone)):
            problems = [differs]
        same += not problems
        mismatches += [f"solo-{number} ({planned.kind}): {problem}" for problem in problems]
    return same, mismatches


def _difference(planned: Planned, seen: Seen, again: Planned, alone: Seen) -> str | None:
    ours, solo = answer_of(planned, seen), answer_of(again, alone)
    return difference(ours, solo, is_whole=not seen.has_left)


def _of_the_end(server: SoakedServer, last: Metrics, before: Held, after: Held, growth: int | None) -> list[str]:
    """What is left over when nobody asks for anything any more."""
    failures = []
    if not last.is_idle:
        failures.append(f"sequences are left: {last}")
    if (status := server.health()) != 200:
        failures.append(f"/health answers {status}")
    if growth is not None and growth > _GROWTH_BYTES:
        failures.append(f"memory grew by {growth / 2**20:.0f} MiB after the first {_WARM_UP} requests")
    if after.open_files > before.open_files + _GROWTH_FILES:
        failures.append(f"{after.open_files} files and sockets are open, {before.open_files} were")
    if after.threads > before.threads + _GROWTH_THREADS:
        failures.append(f"{after.threads} threads run, {before.threads} did")
    return failures


def _of_the_log(logged: Logged, load: _Load, ended: dict[str, int]) -> list[str]:
    """Each request has one line, with the status that its client saw; and as many sequences ended as were accepted."""
    lines = logged.statuses
    failures = [f"the log has: {line}" for line in logged.errors]
    failures += [f"{name} has {len(its)} lines in the log" for name, its in lines.items() if len(its) != 1]
    for name, status in load.statuses.items():
        if lines.get(name) != [status]:
            failures.append(f"{name} was answered {status}, and the log has {lines.get(name)}")
    for name in load.unheard:
        if name in lines:
            failures.append(f"{name} got no answer, and the log has {lines[name]}")
    if not logged.least_sequences <= sum(ended.values()) <= logged.most_sequences:
        accepted = f"{logged.least_sequences} to {logged.most_sequences}"
        failures.append(f"{sum(ended.values())} sequences ended, where {accepted} were accepted")
    return failures


def _counted(names: Iterator[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))
