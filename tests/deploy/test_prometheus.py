"""Rules and dashboard against promtool, our own telemetry, and a real Prometheus that scrapes a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from server.control.params import MAX_KL_NATS
from server.telemetry import Telemetry
from tests.deploy.conftest import (
    DEPLOY,
    check,
    free_ports,
    replica,
    require,
    require_module,
    running,
    wait_until,
    wait_until_up,
)

pytestmark = pytest.mark.deploy
RULES = DEPLOY / "prometheus"
PANELS = json.loads((DEPLOY / "grafana/dashboards/recontrol.json").read_text())["panels"]
SUFFIXES = {
    "histogram": ("_bucket", "_sum", "_count"),
    "summary": ("_sum", "_count"),
    "counter": ("_total",),
    "gauge": ("",),
}
LABELS = {"model_name", "head", "finished_reason", "le", "sign"}
TARGET_LABELS = {"job", "instance"}
# The fake engine edits nothing, so nothing is observed of how long an edit takes.
NOT_FROM_THE_FAKE_ENGINE = "recontrol_edit_duration_seconds"


def rules() -> list[dict[str, Any]]:
    files = [yaml.safe_load((RULES / name).read_text()) for name in ("recording.yml", "alerts.yml")]
    return [rule for file in files for group in file["groups"] for rule in group["rules"]]


def dashboard_queries() -> dict[str, str]:
    """Panel and target -> PromQL as Grafana would send it, for all models."""
    return {
        f"{panel['title']} {target['refId']}": target["expr"].replace("$__rate_interval", "1m").replace("$model", ".*")
        for panel in PANELS
        for target in panel.get("targets", ())
    }


EXPRESSIONS = dashboard_queries() | {rule.get("record") or rule["alert"]: rule["expr"] for rule in rules()}


def exposed_names() -> set[str]:
    """Every series name that the telemetry can expose: what it shows from the start, and what its other types will."""
    telemetry = Telemetry()
    telemetry.bind("m", ["h"])
    families = text_string_to_metric_families(telemetry.render().decode())
    return {
        name
        for family in families
        for name in {sample.name for sample in family.samples} or {family.name + end for end in SUFFIXES[family.type]}
    }


def walk(node: Any) -> Iterator[Any]:
    """Every node of promql-parser's syntax tree below this one."""
    yield node
    for name in ("expr", "lhs", "rhs", "param", "vector_selector", "vs"):
        child = getattr(node, name, None)
        if child is not None and not isinstance(child, str | float):
            yield from walk(child)
    for child in getattr(node, "args", None) or ():
        yield from walk(child)


def test_promtool_accepts_the_configuration_and_the_rules() -> None:
    promtool = require("promtool", "Debian package prometheus")
    assert "SUCCESS" in check([promtool, "check", "config", "prometheus.yml"], cwd=RULES)
    check([promtool, "check", "rules", "--lint-fatal", "recording.yml", "alerts.yml"], cwd=RULES)


@pytest.mark.parametrize("name", ["recording_test.yml", "alerts_test.yml"])
def test_the_rules_do_what_their_unit_tests_say(name: str) -> None:
    promtool = require("promtool", "Debian package prometheus")
    assert "SUCCESS" in check([promtool, "test", "rules", name], cwd=RULES)


def test_every_alert_has_a_unit_test_in_which_it_fires() -> None:
    tests = yaml.safe_load((RULES / "alerts_test.yml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test.get("alert_rule_test", ()) if case["exp_alerts"]}
    assert fired == {rule["alert"] for rule in rules() if "alert" in rule}


def test_the_budget_alert_watches_the_largest_budget_a_request_may_ask_for() -> None:
    (expr,) = [rule["expr"] for rule in rules() if rule.get("alert") == "RecontrolBudgetBroken"]
    assert f'recontrol_edit_kl_bucket{{le="{MAX_KL_NATS:g}"}}' in expr


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_an_expression_names_only_metrics_and_labels_that_there_are(name: str) -> None:
    parser = require_module("promql_parser", "promql-parser")
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    selectors = [n for n in walk(parser.parse(EXPRESSIONS[name])) if isinstance(n, parser.VectorSelector)]
    assert selectors
    assert {selector.name for selector in selectors} <= exposed_names() | recorded | {"up"}
    labels = {matcher.name for selector in selectors for matcher in selector.matchers.matchers}
    assert labels <= LABELS | TARGET_LABELS


def test_the_walk_finds_every_name_of_an_expression() -> None:
    parser = require_module("promql_parser", "promql-parser")
    expr = (
        'histogram_quantile(0.9, sum by (le) (rate(a_bucket{x="1"}[5m]))) / (b > 0) - abs(-(c)) + topk(2, d offset 5m)'
    )
    selectors = [node for node in walk(parser.parse(expr)) if isinstance(node, parser.VectorSelector)]
    assert [selector.name for selector in selectors] == ["a_bucket", "b", "c", "d"]


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in PANELS)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    assert all(panel["description"] for panel in PANELS if panel["type"] != "row")


def test_the_dashboard_and_its_datasource_are_where_grafana_is_told_to_look() -> None:
    grafana = DEPLOY / "grafana/provisioning"
    (source,) = yaml.safe_load((grafana / "datasources/prometheus.yaml").read_text())["datasources"]
    used = {target["datasource"]["uid"] for panel in PANELS for target in panel.get("targets", ())}
    assert used == {source["uid"]}
    (provider,) = yaml.safe_load((grafana / "dashboards/recontrol.yaml").read_text())["providers"]
    volumes = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["grafana"]["volumes"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in volumes


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a Prometheus with our configuration, but for its targets and pace, that scrapes two servers under load."""
    binary = require("prometheus", "Debian package prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    *ports, own_port = free_ports(3)
    config = yaml.safe_load((RULES / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(RULES / name) for name in config["rule_files"]]
    (job,) = config["scrape_configs"]
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": [f"127.0.0.1:{port}" for port in ports]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    url = f"http://127.0.0.1:{own_port}"
    command = [binary, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
               f"--web.listen-address=127.0.0.1:{own_port}", "--log.level=warn"]  # fmt: skip
    servers = [f"http://127.0.0.1:{port}" for port in ports]
    with replica(ports[0]) as first, replica(ports[1]) as second, running(command) as process:
        for server, its_process in zip(servers, (first, second), strict=True):
            wait_until_up(its_process, f"{server}/health")
        wait_until_up(process, f"{url}/-/ready")
        wait_until(lambda: has_seen_load(url, servers), "Prometheus has seen rates of a load")
        yield url


def has_seen_load(url: str, servers: list[str]) -> bool:
    """Puts some load on, and tells whether every recording rule has a value by now."""
    for server in servers:
        for model in ("fake", "fake@positive", "fake@plain"):
            body = {"model": model, "prompt": "hi", "max_tokens": 50}
            assert httpx.post(f"{server}/v1/completions", json=body, timeout=30).status_code == 200
    return all(ask(url, rule["record"]) for rule in rules() if "record" in rule)


def ask(url: str, query: str) -> list[dict[str, Any]]:
    response = httpx.get(f"{url}/api/v1/query", params={"query": query}, timeout=10)
    assert response.status_code == 200, response.text
    return response.json()["data"]["result"]


def test_a_real_prometheus_answers_every_query_of_the_dashboard(prometheus: str) -> None:
    empty = {title for title, query in dashboard_queries().items() if not ask(prometheus, query)}
    assert empty == {title for title, query in dashboard_queries().items() if NOT_FROM_THE_FAKE_ENGINE in query}
    assert ask(prometheus, dashboard_queries()["Replicas up A"])[0]["value"][1] == "2"


def test_a_real_prometheus_evaluates_every_rule_without_an_error(prometheus: str) -> None:
    groups = httpx.get(f"{prometheus}/api/v1/rules").json()["data"]["groups"]
    found = [rule for group in groups for rule in group["rules"]]
    assert len(found) == len(rules())
    assert {rule["health"] for rule in found} == {"ok"}
    assert {rule["lastError"] for rule in found if "lastError" in rule} <= {""}
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    assert {name for name in recorded if not ask(prometheus, name)} == set()


def test_the_counts_of_a_real_prometheus_are_those_of_the_servers(prometheus: str) -> None:
    by_head = ask(prometheus, "sum by (head) (recontrol_controlled_tokens_total)")
    values = {sample["metric"]["head"]: float(sample["value"][1]) for sample in by_head}
    # Each round of load makes 50 tokens under each head and as many without, on each of two servers.
    assert values["positive"] == values["plain"] > 0
    assert values["positive"] % 50 == 0


def test_rule_files_are_those_that_compose_mounts() -> None:
    volumes = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["prometheus"]["volumes"]
    assert "./prometheus:/etc/prometheus:ro" in volumes
    assert all(
        (RULES / name).is_file() for name in yaml.safe_load((RULES / "prometheus.yml").read_text())["rule_files"]
    )
