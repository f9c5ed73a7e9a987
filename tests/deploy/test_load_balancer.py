"""Several real replicas behind a real HAProxy with the shipped configuration, one of them killed under load."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import httpx
import pytest

from tests.deploy.conftest import (
    DEPLOY,
    answers,
    check,
    free_ports,
    replica,
    require,
    running,
    wait_until,
    wait_until_up,
)

pytestmark = pytest.mark.deploy
NAMES = ("one", "two", "three")
NUM_TOKENS = 2000
NUM_STREAMING, NUM_WHOLE = 6, 3


@dataclass(slots=True, frozen=True)
class Outcome:
    """One request as its client saw it; `error` is what the client's library raised or the server sent."""

    replica: str | None
    is_streaming: bool
    begun_s: float
    num_tokens: int
    is_done: bool
    error: str | None

    @property
    def is_complete(self) -> bool:
        return self.error is None and self.is_done and self.num_tokens == NUM_TOKENS


@dataclass(slots=True)
class Cluster:
    url: str
    ports: dict[str, int]
    processes: dict[str, subprocess.Popen[bytes]]
    stack: contextlib.ExitStack
    outcomes: list[Outcome] = field(default_factory=list)

    def start(self, name: str) -> None:
        self.processes[name] = self.stack.enter_context(replica(self.ports[name]))

    def since(self, begun_s: float) -> list[Outcome]:
        return [outcome for outcome in list(self.outcomes) if outcome.begun_s > begun_s]

    def is_serving(self, names: set[str], begun_s: float) -> bool:
        return {outcome.replica for outcome in self.since(begun_s)} >= names


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Every test leaves all replicas running, or stops another one than those before it."""
    haproxy = require("haproxy", "Debian package haproxy")
    *ports, own_port = free_ports(len(NAMES) + 1)
    backend = tmp_path_factory.mktemp("haproxy") / "replicas.cfg"
    lines = [f"server {name} 127.0.0.1:{port}" for name, port in zip(NAMES, ports, strict=True)]
    backend.write_text("\n".join(["backend replicas", *lines, ""]))
    command = [haproxy, "-f", str(DEPLOY / "haproxy/haproxy.cfg"), "-f", str(backend)]
    with contextlib.ExitStack() as stack:
        cluster = Cluster(f"http://127.0.0.1:{own_port}", dict(zip(NAMES, ports, strict=True)), {}, stack)
        for name in NAMES:
            cluster.start(name)
        for name in NAMES:
            wait_until_up(cluster.processes[name], f"http://127.0.0.1:{cluster.ports[name]}/health")
        balancer = stack.enter_context(running(command, env={"LISTEN": f"127.0.0.1:{own_port}"}))
        wait_until_up(balancer, f"{cluster.url}/health")
        yield cluster


def ask(
    client: httpx.Client, url: str, *, is_streaming: bool, on_begin: Callable[[str | None], None] = lambda name: None
) -> Outcome:
    """One request to its end, its tokens in two choices; `on_begin` hears which replica streams."""
    body = {"model": "fake", "prompt": "hi", "max_tokens": NUM_TOKENS // 2, "n": 2, "stream": is_streaming}
    begun_s, name, num_tokens, is_done, error = time.monotonic(), None, 0, False, None
    try:
        with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            name = response.headers.get("x-replica")
            if response.status_code != 200:
                error = f"{response.status_code}: {response.read()!r}"
            elif not is_streaming:
                response.read()
                num_tokens, is_done = response.json()["usage"]["completion_tokens"], True
            else:
                on_begin(name)
                for line in filter(None, response.iter_lines()):
                    is_done = line == "data: [DONE]"
                    event = {} if is_done else json.loads(line.removeprefix("data: "))
                    error = str(event["error"]) if "error" in event else error
                    num_tokens += bool(event.get("choices"))
    except httpx.TransportError as broken:
        error = repr(broken)
    return Outcome(name, is_streaming, begun_s, num_tokens, is_done, error)


@contextlib.contextmanager
def load(cluster: Cluster) -> Iterator[None]:
    """Clients that ask again and again; at the end every request that was begun is waited for."""
    has_ended = threading.Event()
    cluster.outcomes = []

    def work(is_streaming: bool) -> None:
        with httpx.Client(timeout=60) as client:
            while not has_ended.is_set():
                cluster.outcomes.append(ask(client, cluster.url, is_streaming=is_streaming))

    kinds = [True] * NUM_STREAMING + [False] * NUM_WHOLE
    threads = [threading.Thread(target=work, args=(is_streaming,)) for is_streaming in kinds]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        has_ended.set()
        for thread in threads:
            thread.join()


def test_haproxy_accepts_the_shipped_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN", ":8000")
    haproxy = require("haproxy", "Debian package haproxy")
    check([haproxy, "-c", "-f", "haproxy/haproxy.cfg", "-f", "haproxy/compose.cfg"], cwd=DEPLOY)


def test_a_replica_killed_under_load_loses_nothing_but_its_own_running_streams(cluster: Cluster) -> None:
    victim, others = NAMES[0], set(NAMES[1:])

    def kill(name: str | None) -> None:
        if name == victim:
            cluster.processes[victim].kill()

    def has_killed(client: httpx.Client) -> bool:
        """Kills the victim once it streams to us, so that at least one stream is running when it dies."""
        cluster.outcomes.append(ask(client, cluster.url, is_streaming=True, on_begin=kill))
        return cluster.outcomes[-1].replica == victim

    with load(cluster), httpx.Client(timeout=60) as client:
        wait_until(lambda: cluster.is_serving(set(NAMES), 0), "every replica has served a request")
        wait_until(lambda: has_killed(client), "the victim has streamed to us")
        killed_s = time.monotonic()
        wait_until(lambda: len(cluster.since(killed_s)) >= 20, "the others have gone on")
        assert cluster.is_serving(others, killed_s)
        cluster.start(victim)
        restarted_s = time.monotonic()
        wait_until(lambda: cluster.is_serving({victim}, restarted_s), "the replica is back in service", timeout_s=150)
    lost = [outcome for outcome in cluster.outcomes if not outcome.is_complete]
    assert lost
    # No more than could be running on it.
    assert len(lost) <= NUM_STREAMING + 1
    for outcome in lost:
        assert outcome.replica == victim
        assert outcome.is_streaming
        assert outcome.begun_s < killed_s
        # The client's library raises: no cut-off response looks like a whole one.
        assert not outcome.is_done
        assert "incomplete chunked read" in (outcome.error or "")


def test_a_replica_told_to_stop_under_load_loses_nothing_at_all(cluster: Cluster) -> None:
    leaving = NAMES[1]
    with load(cluster):
        wait_until(lambda: cluster.is_serving(set(NAMES), 0), "every replica has served a request")
        cluster.processes[leaving].send_signal(signal.SIGTERM)
        told_s = time.monotonic()
        # uvicorn ends by the signal it was sent, once all is done.
        assert cluster.processes[leaving].wait(timeout=60) == -signal.SIGTERM
        wait_until(lambda: len(cluster.since(told_s)) >= 20, "the others have gone on")
    assert [outcome for outcome in cluster.outcomes if not outcome.is_complete] == []
    assert cluster.is_serving({"one", "three"}, told_s)


def test_metrics_are_not_for_the_clients_of_the_balancer(cluster: Cluster) -> None:
    for path in ("/metrics", "/%6detrics", "/%6D%65trics", "/metrics?a=b"):
        assert httpx.get(httpx.URL(cluster.url).copy_with(raw_path=path.encode())).status_code == 404
    assert answers(f"http://127.0.0.1:{cluster.ports['three']}/metrics")
