"""The files that people expect of a project say the same as the project does."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import yaml

PROJECT = tomllib.loads(Path("pyproject.toml").read_text())


def test_the_licence_is_the_one_that_the_package_names() -> None:
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert Path("LICENSE").read_text().split()[:4] == ["Apache", "License", "Version", "2.0,"]


def test_the_version_has_one_source_and_the_changelog_knows_it() -> None:
    number = PROJECT["project"]["version"]
    assert version("recontrol") == number
    assert f"\n## [{number}]" in Path("CHANGELOG.md").read_text()
    sources = [path for folder in ("server", "value_models", "docs") for path in Path(folder).rglob("*.py")]
    assert not [path for path in sources if f'"{number}"' in path.read_text()]


def test_annotations_are_shipped_for_both_packages() -> None:
    shipped = PROJECT["tool"]["setuptools"]["package-data"]
    for package in ("server", "value_models"):
        assert "py.typed" in shipped[package]
        assert Path(package, "py.typed").exists()


def test_pre_commit_runs_what_make_lint_runs_with_the_tools_that_make_setup_installs() -> None:
    (repo,) = yaml.safe_load(Path(".pre-commit-config.yaml").read_text())["repos"]
    entries = [hook["entry"] for hook in repo["hooks"]]
    lint = re.search(r"(?m)^lint: .*\n((?:\t.*\n)+)", Path("Makefile").read_text())
    assert repo["repo"] == "local"
    assert lint
    for command in lint.group(1).split("\n\t"):
        words = command.strip().replace("$(BIN)", ".venv/bin").removesuffix(" .").split()
        assert any(entry.split()[: len(words)] == words for entry in entries), words
    assert all(Path(entry.split()[0]).exists() for entry in entries)
    assert all(Path(word).exists() for entry in entries for word in entry.split() if word.startswith("tests/"))
