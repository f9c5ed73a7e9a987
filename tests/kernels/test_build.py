"""Where there is a compiler, the kernels of every level that the CPU has are there: a failed build only warns."""

from __future__ import annotations

import importlib.machinery
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from server import kernels
from server.errors import ConfigurationError
from server.kernels import LEVELS, machine_levels, native

needs_kernels = pytest.mark.skipif(not machine_levels() or shutil.which("g++") is None, reason="no AVX2 or no compiler")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> object:
    """`native` as a new process calls it."""
    monkeypatch.setattr(kernels, "kernels_of", kernels.kernels_of.__wrapped__)
    return native.__wrapped__


@needs_kernels
@pytest.mark.parametrize("level", machine_levels())
def test_the_kernels_were_compiled_for_each_level_of_this_machine(level: str) -> None:
    assert kernels.kernels_of(level) is not None, "`pip install -v -e .` shows the compiler's error"


@pytest.mark.parametrize(("count", "why"), [(4, "not compiled"), (0, "no AVX2")])
def test_without_kernels_torch_does_and_the_log_says_why(
    count: int, why: str, load: object, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels, "machine_levels", lambda: LEVELS[:count])
    monkeypatch.setattr(importlib.machinery, "EXTENSION_SUFFIXES", [])
    monkeypatch.delenv("RECONTROL_KERNELS", raising=False)
    with caplog.at_level(logging.INFO):
        assert load() is None  # type: ignore[operator]
    assert [why in message for message in caplog.messages] == [True]


@needs_kernels
def test_a_level_that_was_not_compiled_leaves_the_one_below_it_and_the_log_says_so(
    load: object, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels, "machine_levels", lambda: (machine_levels()[0], "of_next_year"))
    monkeypatch.delenv("RECONTROL_KERNELS", raising=False)
    assert load().level == machine_levels()[0]  # type: ignore[operator]
    assert ["of_next_year were not compiled" in message for message in caplog.messages] == [True]


@needs_kernels
def test_the_environment_chooses_torch_or_a_level_and_otherwise_the_highest_is_taken(
    load: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    for told in ("", *machine_levels()):
        monkeypatch.setenv("RECONTROL_KERNELS", told)
        assert load().level == (told or machine_levels()[-1])  # type: ignore[operator]
    monkeypatch.setenv("RECONTROL_KERNELS", "torch")
    assert load() is None  # type: ignore[operator]


@pytest.mark.parametrize("told", ["sse", "AVX2", "avx512"])
def test_a_level_that_is_not_here_is_refused_with_those_that_are(
    told: str, load: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "machine_levels", lambda: machine_levels()[:1])
    monkeypatch.setenv("RECONTROL_KERNELS", told)
    with pytest.raises(ConfigurationError, match=rf"^RECONTROL_KERNELS: '{told}' cannot be used here; .* torch"):
        load()  # type: ignore[operator]


def test_the_command_line_says_so_in_one_line_and_ends_with_2(
    model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECONTROL_KERNELS", "sse")
    code = "import sys; from server.cli import main; sys.exit(main(sys.argv[1:]))"
    told = ["generate", "Hello", "--model", str(model_folder("llama")), "--device", "cpu"]
    done = subprocess.run([sys.executable, "-c", code, *told], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "recontrol generate: RECONTROL_KERNELS: 'sse' cannot be used here" in done.stderr
    assert "Traceback" not in done.stderr
