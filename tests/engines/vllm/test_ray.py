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

import httpx
import psutil
import pytest

from server.engines.vllm.wire import SCHEDULER, VALIDATOR
from server.settings import Settings
from tests.conftest import Collected
from tests.engines.vllm.ray_driver import answers
from tests.engines.vllm.test_laws import CONTROLS, TOLERANCE, TOLERANCES, assert_same_response
from tests.engines.vllm.test_processes import PYTHONPATH, ROOT, SPLITS, STRONG, free_port, recontrol_serve, serve
from tests.engines.vllm.test_processes import wait_until as wait_until_up

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(900),
]
ADDRESSES = ("127.0.0.2", "127.0.0.3")
"""vLLM wants each node to have its own; Ray takes 127.0.0.1 for another name of the machine's."""
STOPPED = "engine_stopped"
_RAY = (sys.executable, "-c", "import sys; from ray.scripts.scripts import main; sys.exit(main())")


@dataclass
class Cluster:
    """Ray's two nodes. `env` is for whoever is to find the cluster, and runs beside the first node."""

    nodes: list[subprocess.Popen[bytes]]
    env: dict[str, str]

    def num_workers(self) -> list[int]:
        """Of vLLM, on each node."""
        return [sum("RayWorker" in "".join(cmdline) for cmdline in cmdlines(node)) for node in self.nodes]


def cmdlines(process: subprocess.Popen[bytes]) -> Iterator[list[str]]:
    for child in children(process):
        with contextlib.suppress(psutil.NoSuchProcess):
            yield child.cmdline()


def children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []


@pytest.fixture(scope="module")
def cluster(vllm_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    from vllm.platforms import cpu_platform_plugin  # pyright: ignore[reportMissingImports]

    if cpu_platform_plugin() is None:
        pytest.skip("two nodes on one machine would share its GPUs")
    port = free_port()
    # As short as can be: Ray puts sockets below it.
    sessions = Path("/tmp") / f"ray-{port}"
    paths = [str(ROOT / "tests/engines/vllm/ray_on_cpus"), PYTHONPATH]
    env = {
        **os.environ, "PYTHONPATH": os.pathsep.join(paths), "RAY_ADDRESS": f"{ADDRESSES[0]}:{port}",
        "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "VLLM_HOST_IP": ADDRESSES[0],
    }  # fmt: skip
    shared = ("--block", "--num-gpus=1", "--num-cpus=1", "--object-store-memory=80000000")
    head = ("--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={sessions}")
    # What the second node has by its own account, where nobody else says.
    other_heads = shutil.copytree(str(vllm_settings.heads_dir), tmp_path_factory.mktemp("other") / "heads")
    shutil.rmtree(other_heads / "deep")
    nodes: list[subprocess.Popen[bytes]] = []
    segments = shared_memory()
    try:
        for address, flags in zip(ADDRESSES, (head, [f"--address={ADDRESSES[0]}:{port}"]), strict=True):
            command = [*_RAY, "start", f"--node-ip-address={address}", *shared, *flags]
            own = {"VLLM_HOST_IP": address, **({"RECONTROL_HEADS_DIR": str(other_heads)} if nodes else {})}
            nodes.append(subprocess.Popen(command, env={**env, **own}, start_new_session=True))
            wait_until(lambda: nodes[-1].poll() is not None or num_nodes(env) == len(nodes), "the node is there")
            assert nodes[-1].poll() is None, "Ray did not start"
        yield Cluster(nodes, env)
    finally:
        for node in nodes:
            kill(node)
        shutil.rmtree(sessions, ignore_errors=True)
        for segment in shared_memory() - segments:
            segment.unlink(missing_ok=True)


def shared_memory() -> set[Path]:
    """What vLLM's ranks on CPUs exchange tensors by, and leave behind where Ray kills them; without any in use."""
    maps = "".join(read(path) for path in Path("/proc").glob("[0-9]*/maps"))
    return {path for path in Path("/dev/shm").glob("*-cpushm_*") if str(path) not in maps}


def read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text()
    return ""


def num_nodes(env: dict[str, str]) -> int:
    program = "import ray; ray.init(log_to_driver=False); print(sum(node['Alive'] for node in ray.nodes()))"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    return int(done.stdout or 0)


def kill(process: subprocess.Popen[bytes]) -> None:
    """With all that it started, as when a machine goes."""
    for child in children(process):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.kill()
    process.wait()


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
        kill(driver)
    return pickle.loads(result.read_bytes())


# vLLM's two ways to run workers on Ray: queues of its own between actors (its default), or Ray's compiled graph, which
# hands tensors from stage to stage over GPUs unless told not to.
EXECUTORS = {
    "queues": {"VLLM_USE_RAY_V2_EXECUTOR_BACKEND": "1"},
    "graph": {"VLLM_USE_RAY_V2_EXECUTOR_BACKEND": "0", "VLLM_USE_RAY_COMPILED_DAG_CHANNEL_TYPE": "shm"},
}


@pytest.mark.parametrize(("split", "executor"), [("tensor", "queues"), ("pipeline", "queues"), ("pipeline", "graph")])
def test_two_nodes_control_as_one_process_does(
    vllm_settings: Settings, expected: list[Collected], cluster: Cluster, split: str, executor: str, tmp_path: Path
) -> None:
    env = {**cluster.env, **EXECUTORS[executor]}
    mine = answers_over_ray(vllm_settings.model_copy(update=SPLITS[split]), env, tmp_path / "answers")
    for name, ours, theirs in zip([*CONTROLS, "nonlinear"], mine, expected, strict=True):
        assert_same_response(ours, theirs, TOLERANCES.get(name, TOLERANCE))
    wait_until(lambda: cluster.num_workers() == [0, 0], "vLLM's workers have ended")


def test_nodes_with_different_heads_do_not_start(vllm_settings: Settings, cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    flags = ["--tensor-parallel-size", "2", "--distributed-executor-backend", "ray",
             "--scheduler-cls", SCHEDULER, "--logits-processors", VALIDATOR]  # fmt: skip
    process, _ = serve(vllm_settings, *flags, log=log, env=cluster.env)
    try:
        assert process.wait(200) != 0
    finally:
        kill(process)
    assert "are not the same on every machine" in log.read_text()


def test_when_a_node_goes_the_server_says_so_and_ends(
    vllm_settings: Settings, cluster: Cluster, tmp_path: Path
) -> None:
    port, log = free_port(), tmp_path / "log.txt"
    flags = ["--distributed-executor-backend", "ray", "--tensor-parallel-size", "2"]
    command = recontrol_serve(vllm_settings, port, *flags)
    with log.open("wb") as out:
        server = subprocess.Popen(command, env=cluster.env, cwd=tmp_path, stdout=out, stderr=out)
    body = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 6, "ignore_eos": True, "control": STRONG}
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=100) as client:
            wait_until_up(client, "/ready", server, log)
            assert cluster.num_workers() == [1, 1]
            assert client.post("/v1/completions", json=body).json()["choices"][0]["control"]["max_kl"] > 0
            kill(cluster.nodes[1])
            # Perhaps before anyone has noticed: then it must not wait for ever.
            assert client.post("/v1/completions", json=body).json()["error"]["code"] in ("generation_failed", STOPPED)
            wait_until(lambda: client.get("/health").status_code == 503, "the server says so")
            assert client.post("/v1/completions", json=body).json()["error"]["code"] == STOPPED
        left = children(server)
        server.send_signal(signal.SIGTERM)
        assert server.wait(120) in (0, -signal.SIGTERM)
        assert not psutil.wait_procs(left, timeout=30)[1]
        wait_until(lambda: cluster.num_workers() == [0, 0], "vLLM's workers have ended")
    finally:
        kill(server)
