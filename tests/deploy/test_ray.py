"""The example of one model on several machines: the pods inside its custom resource, and its commands on a real Ray.

No schema for custom resources is in the tools, so what KubeRay makes of it, pods, is what is validated.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.settings import Settings
from tests.deploy.conftest import (
    DEPLOY,
    ROOT,
    answers,
    check,
    free_ports,
    require,
    require_module,
    wait_until,
    wait_until_up,
)
from tests.deploy.test_manifests import SERVER, load

pytestmark = pytest.mark.deploy
RAY = DEPLOY / "ray"
CLUSTER = load(RAY / "cluster.yaml")
HEAD, WORKERS = CLUSTER["spec"]["headGroupSpec"], CLUSTER["spec"]["workerGroupSpecs"][0]
PODS = {"head": HEAD["template"], "worker": WORKERS["template"]}
PATCHES = {
    patch["target"]["kind"]: yaml.safe_load(patch["patch"]) for patch in load(RAY / "kustomization.yaml")["patches"]
}
CONFIG = {step["path"].rpartition("/")[2]: step["value"] for step in PATCHES["ConfigMap"]}


def container(pod: str) -> dict[str, Any]:
    (only,) = PODS[pod]["spec"]["containers"]
    return only


@pytest.mark.parametrize("name", PODS)
def test_a_pod_of_the_cluster_is_valid_by_the_schemas_of_kubernetes(name: str, tmp_path: Path) -> None:
    validate = require("kubernetes-validate", "Python package kubernetes-validate")
    metadata = {"name": name, **PODS[name]["metadata"]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": PODS[name]["spec"]}
    (tmp_path / "pod.json").write_text(json.dumps(pod))
    check([validate, "--strict", str(tmp_path / "pod.json")])
    check([validate, "--strict", str(RAY / "network-policy.yaml")])


def test_kustomize_puts_the_cluster_in_the_place_of_the_deployment(tmp_path: Path) -> None:
    kubectl = require("kubectl", "kubernetes.io/docs/tasks/tools", is_optional=True)
    rendered = list(yaml.safe_load_all(check([kubectl, "kustomize", str(RAY)])))
    kinds = sorted(document["kind"] for document in rendered)
    assert kinds == ["ConfigMap", "Namespace", "NetworkPolicy", "NetworkPolicy", "PersistentVolumeClaim", "RayCluster",
                     "Service"]  # fmt: skip
    (cluster,) = [document for document in rendered if document["kind"] == "RayCluster"]
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    images = [pod["image"] for group in groups for pod in group["template"]["spec"]["containers"]]
    assert images == ["registry.example.com/recontrol:vllm"] * 2
    (config,) = [document["data"] for document in rendered if document["kind"] == "ConfigMap"]
    assert config.keys() > CONFIG.keys() | {"RECONTROL_HEADS_DIR", "RECONTROL_HEADS_POLL_S"}


@pytest.mark.parametrize("name", PODS)
def test_pods_keep_to_the_restricted_standard_with_a_read_only_root(name: str) -> None:
    pod = PODS[name]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is pod["enableServiceLinks"] is False
    assert container(name)["securityContext"] == SERVER["securityContext"]
    assert {kind for volume in pod["volumes"] for kind in volume} <= {"name", "emptyDir", "persistentVolumeClaim"}
    mounted = {mount["name"] for mount in container(name)["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_the_model_is_cut_by_gpus_a_pod_and_by_pods() -> None:
    gpus = {name: int(container(name)["resources"]["limits"]["nvidia.com/gpu"]) for name in PODS}
    assert gpus["head"] == gpus["worker"] == int(CONFIG["RECONTROL_TENSOR_PARALLEL_SIZE"])
    assert 1 + WORKERS["replicas"] == int(CONFIG["RECONTROL_PIPELINE_PARALLEL_SIZE"])
    assert WORKERS["minReplicas"] == WORKERS["replicas"] == WORKERS["maxReplicas"]


def test_its_settings_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CONFIG.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert (settings.engine, settings.distributed_executor_backend) == ("vllm", "ray")
    assert (settings.tensor_parallel_size, settings.pipeline_parallel_size) == (8, 2)
    mounts = {mount["mountPath"] for mount in container("worker")["volumeMounts"]}
    assert {Path(settings.model).parent, Path("/heads")} <= set(map(Path, mounts))


def test_the_server_is_asked_as_everywhere_and_a_worker_by_a_port_that_it_has() -> None:
    head, worker = container("head"), container("worker")
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert head[probe]["httpGet"] == SERVER[probe]["httpGet"]
        assert worker[probe]["tcpSocket"] == {"port": worker["ports"][0]["name"]}
    assert WORKERS["rayStartParams"]["node-manager-port"] == str(worker["ports"][0]["containerPort"])
    (step,) = PATCHES["Service"]
    assert step["value"] == {"ray.io/cluster": CLUSTER["metadata"]["name"], "ray.io/node-type": "head"}


def test_rays_ports_are_for_its_own_pods_and_its_dashboard_is_off() -> None:
    """Whoever reaches them can run code (CVE-2023-48022)."""
    spec = load(RAY / "network-policy.yaml")["spec"]
    own = {"matchLabels": {"ray.io/cluster": CLUSTER["metadata"]["name"]}}
    assert spec["podSelector"] == own
    assert spec["ingress"] == [{"from": [{"podSelector": own}]}]
    assert HEAD["rayStartParams"]["include-dashboard"] == "false"


# The commands, on a real Ray


@pytest.fixture
def tools(tmp_path: Path) -> str:
    """A PATH with `ray` and `recontrol`, as in the image."""
    require_module("ray", "ray")
    lines = {
        "ray": "import sys; from ray.scripts.scripts import main; sys.exit(main())",
        "recontrol": "import sys; from server.cli import main; sys.exit(main(sys.argv[1:]))",
    }
    for name, line in lines.items():
        script = tmp_path / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{line}" "$@"\n')
        script.chmod(0o755)
    return f"{tmp_path}{os.pathsep}{os.environ['PATH']}"


@contextlib.contextmanager
def pod(command: list[str], env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A command with all that it starts, which ends with it as a pod's processes do."""
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **env}, start_new_session=True
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def command(name: str, **ray_start: object) -> list[str]:
    flags = " ".join(f"--{flag.replace('_', '-')}={value}" for flag, value in ray_start.items())
    generated = f"ray start {'--head' if name == 'head' else ''} --block {flags}"
    return ["env", f"KUBERAY_GEN_RAY_START_CMD={generated}", *container(name)["command"], *container(name)["args"]]


def test_head_and_worker_make_one_cluster_and_the_server_ends_cleanly(tools: str, tmp_path: Path) -> None:
    gcs, http, raylet = free_ports(3)
    # As short as can be: Ray puts sockets below it.
    sessions = Path("/tmp") / f"ray-{gcs}"
    env = {
        "PATH": tools, "RAY_ADDRESS": f"127.0.0.1:{gcs}", "RAY_USAGE_STATS_ENABLED": "0",
        "RECONTROL_ENGINE": "fake", "RECONTROL_PORT": str(http),
    }  # fmt: skip
    shared = {"num_gpus": 8, "num_cpus": 1, "object_store_memory": 80_000_000}
    head = command(
        "head", port=gcs, node_ip_address="127.0.0.1", temp_dir=sessions, include_dashboard="false", **shared
    )
    worker = command("worker", address=f"127.0.0.1:{gcs}", node_manager_port=raylet, **shared)
    count = "import ray; ray.init(log_to_driver=False); print(len(ray.nodes()), ray.cluster_resources()['GPU'])"
    try:
        with pod(head, env) as server:
            wait_until_up(server, f"http://127.0.0.1:{http}/health")
            with pod(worker, env):
                wait_until(lambda: ask(count, env) == "2 16.0", "both are in the cluster", timeout_s=100)
                assert answers(f"http://127.0.0.1:{http}/health")
            server.send_signal(signal.SIGTERM)
            assert server.wait(timeout=60) in (0, -signal.SIGTERM)
    finally:
        shutil.rmtree(sessions, ignore_errors=True)


def ask(program: str, env: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return done.stdout.strip()
