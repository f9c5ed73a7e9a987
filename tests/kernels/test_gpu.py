"""When a GPU's kernels edit, and that they compile for one; what they do is in tests/control/test_fused.py."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from server.errors import ConfigurationError
from server.kernels import gpu, native
from server.kernels.gpu import edit_kernels_on

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def _first_asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("RECONTROL_KERNELS", raising=False)
    gpu._are_used_on_a_gpu.cache_clear()
    yield
    gpu._are_used_on_a_gpu.cache_clear()


def test_on_a_cpu_they_edit_nothing() -> None:
    assert edit_kernels_on(CPU) is None


def test_on_a_gpu_they_edit_and_the_log_says_so_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: "found")
    with caplog.at_level(logging.INFO, logger="server.kernels.gpu"):
        assert edit_kernels_on(CUDA) is not edit_kernels_on(CUDA)
    assert [
        line.startswith("On the GPU kernels in Triton attend, edit rows and draw tokens") for line in caplog.messages
    ] == [True]


def test_told_to_leave_it_to_torch_they_edit_nothing_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECONTROL_KERNELS", "torch")
    with caplog.at_level(logging.INFO, logger="server.kernels.gpu"):
        assert edit_kernels_on(CUDA) is None
    assert caplog.messages == [
        "On the GPU torch's operations attend, edit rows and draw tokens: RECONTROL_KERNELS asks for them"
    ]


def test_without_triton_torch_edits_and_the_log_warns(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert edit_kernels_on(CUDA) is edit_kernels_on(CUDA) is None
    assert caplog.messages == [
        "On the GPU torch's operations attend, edit rows and draw tokens, slower: triton is not installed"
    ]
    monkeypatch.setenv("RECONTROL_KERNELS", "triton")
    with pytest.raises(ConfigurationError, match="needs the package triton"):
        edit_kernels_on(CUDA)


def test_asked_for_on_a_cpu_they_need_tritons_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: "found")
    monkeypatch.setenv("RECONTROL_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigurationError, match="set TRITON_INTERPRET=1 too"):
        edit_kernels_on(CPU)


def test_asking_for_them_leaves_a_cpus_kernels_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = native.__wrapped__()
    monkeypatch.setenv("RECONTROL_KERNELS", "triton")
    asked = native.__wrapped__()
    assert (None if asked is None else asked.level) == (None if usual is None else usual.level)


_COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from server.kernels.gpu import (
    ascent_kernel, attention_kernel, beside_kernels, budget_kernels, draw_kernel, move_kernel,
)

CODES = {"BY_CAP": 6, "BY_GATE": 3, "BY_LEVEL": 7, "BY_PINNED": 9, "REPORTED": 37}
CONSTANTS = {"ROUND": 1, "HAS_BESIDE": True, "IS_WIDENED": True, "TOLERANCE": 1e-3, **CODES}
ATTENTION = {
    "QUERIES": 4, "KEY_SIZE": 64, "VALUE_SIZE": 64, "ROWS": 64, "KEYS": 64, "VALUES": 64, "PAGE": 64,
    "HAS_BLOCKS": True, "IS_SPLIT": False, "HAS_SINKS": True, "HAS_CAP": True, "PRECISION": "tf32",
}
CONSTANTS |= {**ATTENTION, "HAS_RULES": True}
BRAINS = ("hidden", "queries", "keys", "values", "out")
WHOLE = (
    "hidden_stride", "hidden_size", "num_heads", "num_units", "logits_stride", "source_stride", "size_V", "num_splits",
    "num_first", "first_splits", "beside_splits", "chunk", "query_stride", "table_width", "window", "split_pages",
    "num_outputs", "mask_width",
)
TILES = {"ascend": 512, "measure": 1024, "probe": 512, "weigh": 512, "seek": 128, "seek_alone": 128, "move": 1024,
         "draw": 2048}
OPTIONS = {"draw": {"num_warps": 16, "enable_fp_fusion": False}}

def type_of(name, logits):
    if name in CONSTANTS or name == "TILE":
        return "constexpr"
    if name in WHOLE:
        return "i32"
    if name in BRAINS:
        return "*bf16"
    if name in ("scaling", "softcap", "feature_limit", "width", "height"):
        return "fp32"
    known = {"places_B": "*i32", "tokens_B": "*i64", "source": logits, "tables": "*i32", "blocks": "*i32"}
    known |= {"sequences_T": "*i64", "positions_T": "*i64"}
    known |= dict.fromkeys(("places_BP", "biased_N", "prompt_N", "outputs_2N", "masks_MW"), "*i32")
    return known.get(name, "*fp32")

kernels = [ascent_kernel.ascend, *(getattr(budget_kernels, name) for name in ("measure", "probe", "settle"))]
kernels += [beside_kernels.weigh, beside_kernels.seek, move_kernel.move]
kernels += [draw_kernel.draw, attention_kernel.attend, attention_kernel.join]
uncapped = [(kernel, {"HAS_CAP": False}) for kernel in (beside_kernels.weigh, beside_kernels.seek, move_kernel.move)]
for kernel, more in [*((kernel, {}) for kernel in (*kernels, beside_kernels.seek_alone)), *uncapped]:
    names = kernel.arg_names
    signature = {name: type_of(name, "*bf16") for name in names}
    if "IS_WIDENED" not in names and "logits" in names:
        signature["logits"] = "*bf16"
    known = {**CONSTANTS, **more, "TILE": TILES.get(kernel.__name__)}
    constants = {name: value for name, value in known.items() if name in names}
    options = OPTIONS.get(kernel.__name__)
    made = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32), options=options)
    print(kernel.__name__, made.metadata.shared, len(made.asm["cubin"]) > 0)
"""


@pytest.mark.triton
def test_they_compile_for_a_hopper_gpu_without_one() -> None:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", _COMPILE], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    told = [line.split() for line in done.stdout.splitlines()]
    names = "ascend measure probe settle weigh seek move draw attend join seek_alone weigh seek move"
    assert [(name, is_made) for name, _, is_made in told] == [(name, "True") for name in names.split()]
