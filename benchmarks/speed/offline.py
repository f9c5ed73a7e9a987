"""New tokens a second without HTTP: one batch of equally long prompts at a time. Enter at `measure`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.speed.figures import spread
from benchmarks.speed.peers import ARMS, PEERS, Found, child_env, objectives, worker_command
from benchmarks.speed.process import PeerError, Worker
from benchmarks.speed.setup import Setup, Workload
from benchmarks.speed.turns import Keep, Key, Results, Turns

_TIMEOUT_S = 3600.0
"""For one command: a large model may load for long, and a slow peer take long for its batch."""


def measure(
    setup: Setup,
    arms: Sequence[str],
    found: Mapping[str, Found],
    workload: Workload,
    *,
    batch_sizes: Sequence[int],
    repeats: int,
    keep: Keep,
) -> Results:
    """By arm, its peer's facts and its figures at each batch size; each size is run once before what counts."""
    return _Offline(setup, found, workload).run(arms, batch_sizes, repeats, warm_up=True, keep=keep)


class Engines(Turns):
    """Peers' engines as workers without HTTP, which `generate` asks for a batch."""

    def open(self, peer: str) -> dict[str, Any]:
        return self.load(peer, peer)

    def load(self, peer: str, name: str) -> dict[str, Any]:
        """Start one of a peer's workers, as the child of this name. Facts. Raises PeerError."""
        spec, python = PEERS[peer], self.found[peer].python
        options = {**self.setup.load_options(), **spec.options}
        if spec.gguf is not None:
            options["gguf"] = str(spec.gguf(self.setup))
        started_s = time.perf_counter()
        env = child_env(spec, self.setup, python)
        worker = self.children[name] = Worker(worker_command(spec, python), env=env, log=self.log(name))
        loaded = worker.ask("load", timeout_s=_TIMEOUT_S, **options)
        self.generate(name, self.workload.prompts(1, "start"), 1, 0, [])
        return {"startup_s": time.perf_counter() - started_s, "facts": loaded["facts"]}

    def last_facts(self, peer: str) -> dict[str, Any]:
        return self._worker(peer).ask("memory", timeout_s=_TIMEOUT_S)

    def generate(
        self, name: str, prompts: list[list[int]], new_tokens: int, seed: int, row_objectives: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """A batch by the child of this name: `num_tokens`, `seconds`. Raises PeerError."""
        answer = self._worker(name).ask(
            "generate",
            timeout_s=_TIMEOUT_S,
            prompts=prompts,
            new_tokens=new_tokens,
            seed=seed,
            objectives=row_objectives,
        )
        expected = len(prompts) * new_tokens
        if answer["num_tokens"] != expected:
            raise PeerError(f"gave {answer['num_tokens']} tokens where {expected} were asked for")
        return answer

    def _worker(self, name: str) -> Worker:
        worker = self.children[name]
        assert isinstance(worker, Worker)
        return worker


class _Offline(Engines):
    kind = "offline"
    keys = "batches"

    def turn(self, arm: str, key: Key, repeat: int) -> dict[str, Any]:
        size, workload = int(key), self.workload
        prompts = workload.prompts(size, "offline", repeat)
        seed = workload.seed_of("offline", size, repeat)
        return self.generate(
            ARMS[arm].peer, prompts, workload.new_tokens, seed, objectives(ARMS[arm], self.setup.heads)
        )

    def figures(self, key: str, turns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        del key
        result: dict[str, Any] = {
            "tokens_per_s": spread([turn["num_tokens"] / turn["seconds"] for turn in turns]),
            "seconds": [turn["seconds"] for turn in turns],
        }
        if "edits" in turns[-1]:
            result["edits"] = [turn["edits"] for turn in turns]
        return result
