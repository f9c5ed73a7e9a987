"""RECONTROL_* variables: what Kubernetes sets by itself stops nothing, and what nobody reads is reported."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from server.cli import main
from server.environment import OTHERS, service_links, unknown_variable
from server.settings import Settings

LINKS = {
    "RECONTROL_SERVICE_HOST": "10.0.0.1",
    "RECONTROL_SERVICE_PORT": "8000",
    "RECONTROL_SERVICE_PORT_HTTP": "8000",
    "RECONTROL_PORT": "tcp://10.0.0.1:8000",
    "RECONTROL_PORT_8000_TCP": "tcp://10.0.0.1:8000",
    "RECONTROL_PORT_8000_TCP_ADDR": "10.0.0.1",
    "RECONTROL_PORT_8000_TCP_PORT": "8000",
    "RECONTROL_PORT_8000_TCP_PROTO": "tcp",
    "RECONTROL_ENGINE_PORT": "udp://[fd00::1]:53",
    "RECONTROL_ENGINE_SERVICE_HOST": "fd00::1",
}
"""As Kubernetes has them for Services called `recontrol` and `recontrol-engine`."""


def test_what_kubernetes_sets_for_a_service_stops_no_server(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in LINKS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RECONTROL_MAX_WAITING", "7")
    assert main(["serve", "--print-config"]) == 0
    settings = json.loads(capsys.readouterr().out)
    assert (settings["port"], settings["max_waiting"]) == (8000, 7)
    assert main(["heads", "list"]) == 0


def test_links_are_told_from_settings_by_name_and_value() -> None:
    assert service_links(LINKS) == list(LINKS)
    settings = {f"RECONTROL_{name.upper()}": "8000" for name in Settings.model_fields}
    assert service_links({**settings, "OTHER_SERVICE_HOST": "x"}) == []


def test_a_server_says_which_variables_it_passes_over(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECONTROL_PORT", LINKS["RECONTROL_PORT"])
    assert main(["serve", "--model", "/nonexistent"]) == 2
    warning = capsys.readouterr().err.splitlines()[0]
    assert "RECONTROL_PORT" in warning
    assert "enableServiceLinks" in warning


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("RECONTROL_MODLE", "; did you mean RECONTROL_MODEL?"),
        ("RECONTROL_APIKEYS", "; did you mean RECONTROL_API_KEYS?"),
        ("recontrol_prot", "; did you mean RECONTROL_PORT?"),
        ("RECONTROL_KERNEL", "; did you mean RECONTROL_KERNELS?"),
        ("RECONTROL_QQQQ", ""),
    ],
)
@pytest.mark.parametrize("words", [["serve", "--print-config"], ["heads", "list"]])
def test_a_variable_that_nothing_reads_is_reported_with_the_nearest_name(
    words: list[str], name: str, nearest: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "x")
    assert main(words) == 2
    assert capsys.readouterr().err.endswith(f": {name}: there is no such setting{nearest}\n")


def test_a_variable_of_another_command_or_of_another_part_is_no_mistake(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECONTROL_REWARD", "brevity")
    monkeypatch.setenv("RECONTROL_REQUIRE_VLLM", "1")
    monkeypatch.setenv("recontrol_host", "::1")
    assert main(["serve", "--print-config"]) == 0
    assert json.loads(capsys.readouterr().out)["host"] == "::1"


def test_every_variable_that_this_project_names_is_known() -> None:
    root = Path(__file__).parents[1]
    sources = [path for folder in ("server", "value_models", "deploy", "docs") for path in (root / folder).rglob("*.*")]
    text = "".join(path.read_text() for path in sources if path.suffix in {".py", ".js", ".md", ".yaml"})
    named = set(re.findall(r"RECONTROL_[A-Z0-9_]*[A-Z0-9]\b", text))
    assert named > OTHERS
    assert unknown_variable(dict.fromkeys(named, ""), Settings.model_fields) is None


def test_an_unknown_key_of_the_file_is_reported_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c.toml").write_text("modle = 1\n")
    monkeypatch.setenv("RECONTROL_CONFIG", str(tmp_path / "c.toml"))
    assert main(["serve", "--print-config"]) == 2
    assert capsys.readouterr().err == "recontrol serve: modle: there is no such setting; did you mean model?\n"
