"""The capacity model: its constants against the editor and published sizes, its laws, and the page it is on."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from server.control.editor import StateEditor
from server.control.params import ControlParams
from server.control.plan import EditPlan
from server.control.registry import HeadRegistry
from server.engines.embedded.model.lm_head import LMHead
from tests.deploy.conftest import DEPLOY
from value_models.heads import LinearHead, MLPHead, ValueHead


def _load() -> ModuleType:
    """A script outside of any package."""
    spec = importlib.util.spec_from_file_location("capacity", DEPLOY / "capacity.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["capacity"] = module
    spec.loader.exec_module(module)
    return module


capacity = _load()
DEFAULTS = capacity.constants({})
D, V, WIDTH, ROWS = DEFAULTS["hidden_size"], DEFAULTS["vocab_size"], 512, 16
_FIRST = {"mean_D": torch.zeros(D), "scale_D": torch.ones(D)}
HEADS: dict[str, ValueHead] = {
    "linear": LinearHead(**_FIRST, inputs_UD=torch.zeros(1, D), input_bias_U=torch.zeros(1)),
    "mlp": MLPHead(
        **_FIRST, inputs_UD=torch.zeros(WIDTH + 1, D), input_bias_U=torch.zeros(WIDTH + 1),
        out_weight_H=torch.zeros(WIDTH), out_bias=torch.zeros(()),
    ),
}  # fmt: skip


class Traffic(TorchDispatchMode):
    """Kernels that operators outside of matrix products launch, and the bytes of their vocabulary-sized operands."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes, self.num_kernels = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view:
            self.num_kernels += 1
            if func not in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
                self.num_bytes += sum(t.numel() * t.element_size() for t in tensors if t.numel() >= V)
        return result


def measured(head: str | None) -> tuple[float, float, int]:
    """FLOPs, bytes and kernels of the editor's step on a device without arithmetic, which takes the GPU's way."""
    registry = HeadRegistry({name: value.to("meta") for name, value in HEADS.items()})
    editor = StateEditor(LMHead(nn.Linear(D, V, bias=False, device="meta", dtype=torch.bfloat16)))
    control = head and ControlParams.model_validate({"objective": {"weights": {head: 1.0}}})
    plan = EditPlan.from_rows([control or None] * ROWS, registry, device="meta")
    hidden_BD = torch.empty(ROWS, D, device="meta", dtype=torch.bfloat16)
    editor.logits(hidden_BD, plan)  # what is made once and kept
    with FlopCounterMode(display=False) as flops, Traffic() as traffic:
        editor.logits(hidden_BD, plan)
    return flops.get_total_flops(), traffic.num_bytes, traffic.num_kernels


@pytest.mark.parametrize("method", HEADS)
def test_what_control_adds_is_what_the_editor_does(method: str) -> None:
    flops, num_bytes, kernels = (a - b for a, b in zip(measured(method), measured(None), strict=True))
    assert flops / ROWS / (2 * D * V) == pytest.approx(DEFAULTS[f"control_{method}_products"], abs=0.02)
    assert num_bytes / ROWS / V == pytest.approx(DEFAULTS[f"control_{method}_bytes_per_vocab_entry"], rel=0.03)
    assert kernels == pytest.approx(DEFAULTS[f"control_{method}_kernels"], rel=0.1)


def test_the_models_sizes_are_those_that_transformers_builds() -> None:
    config = LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=14336, num_hidden_layers=DEFAULTS["num_layers"],
        num_attention_heads=DEFAULTS["num_query_heads"], num_key_value_heads=DEFAULTS["num_kv_heads"],
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == DEFAULTS["num_parameters"]
    assert config.hidden_size // config.num_attention_heads == DEFAULTS["head_size"]


def test_one_row_costs_the_weights_traffic_and_no_more() -> None:
    ideal = capacity.constants(
        {"bandwidth_share": 1, "flops_share": 1, "step_overhead_s": 1e-12, "prompt_tokens": 1, "response_tokens": 1}
    )
    weights_s = (DEFAULTS["num_parameters"] - D * V) * 2 / DEFAULTS["hbm_bytes_per_s"]
    assert capacity.decode_step_s(ideal, batch_size=1) == pytest.approx(weights_s, rel=1e-4)


def test_a_huge_batch_is_bound_by_arithmetic() -> None:
    ideal = capacity.constants(
        {"step_overhead_s": 1e-12, "prompt_tokens": 1, "response_tokens": 1, "hbm_bytes_per_s": 1e18}
    )
    rate = DEFAULTS["flops_per_s"] * DEFAULTS["flops_share"]
    row_s = 2 * (DEFAULTS["num_parameters"] - D * V) / rate
    assert capacity.decode_step_s(ideal, batch_size=4096) == pytest.approx(4096 * row_s, rel=1e-3)


def test_control_never_makes_a_step_faster_and_costs_more_with_more_rows() -> None:
    added = {
        method: [
            capacity.decode_step_s(DEFAULTS, batch_size=size, method=method)
            - capacity.decode_step_s(DEFAULTS, batch_size=size)
            for size in capacity.BATCH_SIZES
        ]
        for method in HEADS
    }
    for costs in added.values():
        assert all(more >= less - 1e-12 for less, more in itertools.pairwise(costs))
        assert costs[0] > 0
    assert added["mlp"][-1] >= added["linear"][-1]


def test_control_that_adds_nothing_costs_nothing() -> None:
    free = capacity.constants({name: 0 for name in DEFAULTS if name.startswith("control_")})
    assert capacity.service(free, method="mlp") == capacity.service(free)


def test_gpus_cover_the_load_and_one_fewer_would_not() -> None:
    for method in capacity.METHODS:
        one = capacity.service(DEFAULTS, method=method)
        usable = one.requests_per_s * DEFAULTS["load_share"]
        assert (one.num_gpus - 1) * usable < DEFAULTS["requests_per_s"] <= one.num_gpus * usable


def test_less_memory_means_a_smaller_batch() -> None:
    small = capacity.constants({"memory_bytes": 24e9})
    assert 0 < capacity.largest_batch(small) < capacity.largest_batch(DEFAULTS) == DEFAULTS["max_batch_size"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"gpu": 1}, "unknown constants gpu; known: "),
        ({"usd_per_hour": 0}, "usd_per_hour is 0"),
        ({"usd_per_hour": "2"}, "usd_per_hour is '2'"),
        ({"usd_per_hour": True}, "usd_per_hour is True"),
        ({"memory_bytes": 1e9}, "no room for a single sequence"),
        ([1], "one JSON object"),
    ],
)
def test_wrong_constants_are_refused_by_name(
    given: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(given))
    assert capacity.main(["--constants", str(tmp_path / "mine.json")]) == 2
    assert words in capsys.readouterr().err


def test_given_constants_are_used_and_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.json").write_text('{"usd_per_hour": 5.0}')
    assert capacity.main(["--constants", str(tmp_path / "mine.json")]) == 0
    assert "| `usd_per_hour` | 5 | given |" in capsys.readouterr().out


def test_every_default_has_a_source() -> None:
    assert all(entry["source"] for entry in json.loads((DEPLOY / "capacity.json").read_text()).values())


def test_the_page_shows_what_the_script_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (DEPLOY / "README.md").read_text()
    assert capacity.main([]) == 0
    (section,) = capacity.SECTION.findall(page)
    assert section == capsys.readouterr().out
    copy = tmp_path / "page.md"
    copy.write_text(page.replace(section, "old\n"))
    assert capacity.main(["--into", str(copy)]) == 0
    assert copy.read_text() == page
    copy.write_text("nothing")
    assert capacity.main(["--into", str(copy)]) == 2
    assert "has no section" in capsys.readouterr().err
