"""Tokens a second without HTTP: one batch of equal prompts at a time, peers by turns, whoever waits is frozen.

Enter at `measure`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from server.bench.figures import spread
from server.bench.peers import ARMS, PEERS, Found, child_env, objectives, worker_command
from server.bench.process import PeerError, Worker
from server.bench.setup import Setup
from server.bench.workload import Workload

_LOAD_TIMEOUT_S = 3600.0
_TURN_TIMEOUT_S = 3600.0


def measure(
    setup: Setup,
    arms: Sequence[str],
    found: Mapping[str, Found],
    workload: Workload,
    *,
    batch_sizes: Sequence[int],
    repeats: int,
) -> dict[str, Any]:
    """By arm, its figures; an arm whose peer fails says so under `failed`, keeps what it had, and the others go on."""
    run = _Run(setup, found, workload)
    results: dict[str, dict[str, Any]] = {arm: {"batches": {}} for arm in arms}
    try:
        for peer in dict.fromkeys(ARMS[arm].peer for arm in arms):
            run.start(peer)
        turns = [
            (size, repeat, arm)
            for repeat in range(-1, repeats)
            for size in batch_sizes
            # Every arm comes first once in a while.
            for arm in [*arms[max(repeat, 0) % len(arms) :], *arms[: max(repeat, 0) % len(arms)]]
        ]
        for size, repeat, arm in (progress := tqdm(turns, desc="offline", unit="turn")):
            progress.set_postfix_str(f"{arm}, batch {size}")
            answer = run.turn(arm, size, repeat)
            if answer is not None and repeat >= 0:
                results[arm]["batches"].setdefault(str(size), []).append(answer)
        for arm, result in results.items():
            result["batches"] = {size: _batch(answers) for size, answers in result["batches"].items()}
            result.update(run.facts(ARMS[arm].peer))
    finally:
        run.end()
    return results


class _Run:
    """The workers of one run, each frozen but for its own turns."""

    def __init__(self, setup: Setup, found: Mapping[str, Found], workload: Workload) -> None:
        self._setup = setup
        self._found = found
        self._workload = workload
        self._workers: dict[str, Worker] = {}
        self._facts: dict[str, dict[str, Any]] = {}

    def start(self, name: str) -> None:
        """Load the model, and time it until the first token has come."""
        setup, peer, python = self._setup, PEERS[name], self._found[name].python
        self._facts[name] = {}
        try:
            options = setup.load_options()
            if peer.gguf is not None:
                options["gguf"] = str(peer.gguf(setup))
            started_s = time.perf_counter()
            log = setup.work / "logs" / f"{name}-offline.log"
            worker = Worker(worker_command(peer, python), env=child_env(peer, setup, python), log=log)
            self._workers[name] = worker
            loaded = worker.ask("load", timeout_s=_LOAD_TIMEOUT_S, **options)
            prompts = self._workload.prompts(1, "start")
            worker.ask(
                "generate", timeout_s=_TURN_TIMEOUT_S, prompts=prompts, new_tokens=1, seed=setup.seed, objectives=[]
            )
            self._facts[name] = {"startup_s": time.perf_counter() - started_s, "facts": loaded["facts"]}
            worker.freeze()
        except PeerError as error:
            self._fail(name, error)

    def turn(self, arm: str, size: int, repeat: int) -> dict[str, Any] | None:
        """One batch; None when the peer has failed, now or before."""
        name = ARMS[arm].peer
        if "failed" in self._facts[name]:
            return None
        workload, worker = self._workload, self._workers[name]
        expected = size * workload.new_tokens
        try:
            with worker.awake():
                answer = worker.ask(
                    "generate",
                    timeout_s=_TURN_TIMEOUT_S,
                    prompts=workload.prompts(size, "offline", repeat),
                    new_tokens=workload.new_tokens,
                    seed=workload.seed_of("offline", size, repeat),
                    objectives=objectives(ARMS[arm], self._setup.heads),
                )
            if answer["num_tokens"] != expected:
                raise PeerError(f"gave {answer['num_tokens']} tokens where {expected} were asked for")
        except PeerError as error:
            self._fail(name, error)
            return None
        return answer

    def facts(self, name: str) -> dict[str, Any]:
        """What is known of a peer at the end of the run; memory is the most it held in all of it."""
        facts, worker = self._facts[name], self._workers.get(name)
        if "failed" not in facts and worker is not None:
            worker.thaw()
            try:
                facts |= worker.ask("memory", timeout_s=_TURN_TIMEOUT_S)
            except PeerError as error:
                self._fail(name, error)
            facts |= {"peak_rss_bytes": worker.peak_rss_bytes(), "idle_cpu_s": worker.idle_cpu_s}
            worker.freeze()
        return facts

    def end(self) -> None:
        for worker in self._workers.values():
            worker.end()

    def _fail(self, name: str, error: PeerError) -> None:
        tqdm.write(f"{name}: {error}")
        self._facts[name]["failed"] = str(error)


def _batch(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One batch size's repeats."""
    result: dict[str, Any] = {
        "tokens_per_s": spread([answer["num_tokens"] / answer["seconds"] for answer in answers]),
        "seconds": [answer["seconds"] for answer in answers],
    }
    if "edits" in answers[-1]:
        result["edits"] = answers[-1]["edits"]
    return result
