"""vLLM on a real Ray of two nodes, here both on this machine: answers, heads, a clean end, and a node that goes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from server.settings import Settings
from tests.conftest import Collected
from tests.engines.vllm.ray_driver import answers
from tests.engines.vllm.test_laws import CONTROLS, TOLERANCE, TOLERANCES, assert_same_edits, logprobs
from tests.engines.vllm.test_processes import ROOT, end, free_port

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(900),
]
ADDRESSES = ("127.0.0.1", "127.0.0.2")
"""vLLM wants each node to have its own."""
_RAY = (sys.executable, "-c", "import sys; from ray.scripts.scripts import main; sys.exit(main())")


@dataclass
class Cluster:
    """Ray's two nodes. `env` is for whoever is to find the cluster, and runs beside the first node."""

    nodes: list[subprocess.Popen[bytes]]
    env: dict[str, str]

    def workers(self) -> list[psutil.Process]:
        """vLLM's, wherever they run."""
        found = [child for node in self.nodes for child in children(node)]
        return [process for process in found if "RayWorker" in "".join(process.cmdline())]


def children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    port = free_port()
    # As short as can be: Ray puts sockets below it.
    sessions = Path("/tmp") / f"ray-{port}"
    paths = [str(ROOT / "tests/engines/vllm/ray_on_cpus"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = {
        **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "RAY_ADDRESS": f"{ADDRESSES[0]}:{port}",
        "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "VLLM_HOST_IP": ADDRESSES[0],
    }  # fmt: skip
    shared = ("--block", "--num-gpus=1", "--num-cpus=1", "--object-store-memory=80000000")
    head = ("--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={sessions}")
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        for address, flags in zip(ADDRESSES, (head, [f"--address={ADDRESSES[0]}:{port}"]), strict=True):
            command = [*_RAY, "start", f"--node-ip-address={address}", *shared, *flags]
            nodes.append(subprocess.Popen(command, env={**env, "VLLM_HOST_IP": address}, start_new_session=True))
            wait_until(lambda: num_nodes(env) == len(nodes), "the node is in the cluster")
        yield Cluster(nodes, env)
    finally:
        for node in nodes:
            kill(node)
        shutil.rmtree(sessions, ignore_errors=True)


def num_nodes(env: dict[str, str]) -> int:
    program = "import ray; ray.init(log_to_driver=False); print(sum(node['Alive'] for node in ray.nodes()))"
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=60)
    return int(done.stdout or 0)


def kill(node: subprocess.Popen[bytes]) -> None:
    """A node with all that runs on it."""
    processes = [*children(node), psutil.Process(node.pid)] if node.poll() is None else []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    node.wait()


def wait_until(is_so: Callable[[], bool], what: str, *, timeout_s: float = 100) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline_s, f"waited {timeout_s:g} s in vain: {what}"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def expected(vllm_settings: Settings) -> list[Collected]:
    """Of one process, without Ray."""
    return asyncio.run(answers(vllm_settings))


def answers_over_ray(settings: Settings, env: dict[str, str], result: Path) -> list[Collected]:
    over_ray = settings.model_copy(update={"distributed_executor_backend": "ray"})
    command = [sys.executable, "-m", "tests.engines.vllm.ray_driver", over_ray.model_dump_json(), str(result)]
    driver = subprocess.Popen(command, env=env, cwd=ROOT, start_new_session=True)
    try:
        assert driver.wait(400) == 0
    finally:
        end(driver)
    return pickle.loads(result.read_bytes())


# vLLM's runner for CPUs makes the buffers between stages while it warms up, which it does only to compile.
TRACED = {"compilation_config": {"mode": 2, "backend": "eager"}, "block_size": 32}
SPLITS = {
    "tensor": {"tensor_parallel_size": 2},
    "pipeline": {"pipeline_parallel_size": 2, "vllm_options": TRACED},
}


@pytest.mark.parametrize("executor", ["queues", "graph"])
@pytest.mark.parametrize("split", SPLITS)
def test_two_nodes_control_as_one_process_does(
    vllm_settings: Settings, expected: list[Collected], cluster: Cluster, split: str, executor: str, tmp_path: Path
) -> None:
    env = {**cluster.env, "VLLM_USE_RAY_V2_EXECUTOR_BACKEND": "1" if executor == "queues" else "0"}
    mine = answers_over_ray(vllm_settings.model_copy(update=SPLITS[split]), env, tmp_path / "answers")
    for name, ours, theirs in zip([*CONTROLS, "nonlinear"], mine, expected, strict=True):
        tolerance = TOLERANCES.get(name, TOLERANCE)
        assert ours.token_ids == theirs.token_ids
        torch.testing.assert_close(logprobs(ours), logprobs(theirs), atol=tolerance, rtol=0)
        assert_same_edits(ours.chunks, theirs.chunks, tolerance)
    wait_until(lambda: not cluster.workers(), "vLLM's workers have ended")
