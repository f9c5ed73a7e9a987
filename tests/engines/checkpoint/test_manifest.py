"""What a converted model was is written beside it, and what has changed is told by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from server.engines.checkpoint import manifest
from server.engines.checkpoint.manifest import check_manifest, write_manifest
from server.errors import ModelLoadError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    write_manifest(tmp_path)
    return tmp_path


def at_another_time(file: Path) -> None:
    os.utime(file, (1.0, 1.0))


def test_a_folder_that_is_as_it_was_is_not_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "_sha256", lambda file: pytest.fail(f"{file} was read"))
    check_manifest(folder)


def test_a_copy_with_other_times_is_read_again_and_is_the_same(folder: Path) -> None:
    at_another_time(folder / "model.safetensors")
    check_manifest(folder)


def test_a_folder_of_an_earlier_version_has_no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    (folder / "config.json").write_text("[]")
    check_manifest(folder)


def other_bytes(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"Weights")
    at_another_time(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (other_bytes, "model.safetensors is not as it was converted"),
        (lambda folder: (folder / "config.json").write_text("{} "), "config.json is not as it was converted"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is gone"),
        (lambda folder: (folder / "chat_template.jinja").touch(), "chat_template.jinja was not converted"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text('{"files": {"config.json": 1}}'), "model.safetensors"),
    ],
    ids=["other bytes", "longer", "gone", "added", "no manifest", "short manifest"],
)
def test_what_has_changed_is_told_by_name(folder: Path, change: Callable[[Path], object], what: str) -> None:
    change(folder)
    with pytest.raises(ModelLoadError, match=what) as raised:
        check_manifest(folder)
    assert f"Remove {folder}" in str(raised.value)
