"""LoRA adapters: merged to what peft computes, or refused in one line."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from server.cli import main
from server.control.registry import HeadRegistry
from server.engines.embedded.model.loader import load_model
from server.errors import HeadMismatchError, ModelLoadError
from server.settings import Settings
from tests.conftest import random_head, write_heads
from tests.engines.checkpoint.conftest import Folder

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
TOKEN_IDS = torch.arange(40)[None]
WEIGHTS = "adapter_model.safetensors"
Make = Callable[..., tuple[Folder, torch.Tensor]]


@pytest.fixture
def adapter(model_folder: Callable[[str], Path], tmp_path: Path) -> Make:
    """An adapter's folder and the logits of peft's own model with it, not merged."""
    peft = pytest.importorskip("peft")

    def make(base: str = "qwen2", **options: Any) -> tuple[Folder, torch.Tensor]:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(model_folder(base), dtype=torch.float32)
        options = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **options}
        with warnings.catch_warnings(action="ignore"):
            wrapped = peft.get_peft_model(model, peft.LoraConfig(**options)).eval()
            with torch.no_grad():
                for name, parameter in wrapped.named_parameters():
                    if "lora_A" in name or "lora_B" in name or "lora_embedding" in name:
                        parameter.normal_(0, 0.2)
                logits = wrapped(TOKEN_IDS).logits
            wrapped.save_pretrained(tmp_path / "poet")
        return Folder(tmp_path / "poet"), logits

    return make


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKEN_IDS).logits


MERGED: dict[str, dict[str, Any]] = {
    "attention": {},
    "every layer, scaled by the root of the rank": {"target_modules": "all-linear", "use_rslora": True},
    "DoRA": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "ranks of their own": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 32}},
    "the head": {"target_modules": ["lm_head"]},
    "the embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "whole modules": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "no task": {"task_type": None},
    "biases": {"bias": "lora_only"},
    "tied": {"base": "llama", "target_modules": "all-linear"},
    "transposed": {"base": "gpt2", "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
}


@pytest.mark.parametrize("case", MERGED)
def test_a_merged_adapter_is_what_peft_computes_beside_the_model(
    adapter: Make, model_folder: Callable[[str], Path], case: str
) -> None:
    folder, due = adapter(**MERGED[case])
    base = model_folder(MERGED[case].get("base", "qwen2"))
    loaded, plain = (load_model(str(base), device="cpu", dtype="float32", adapter=a) for a in (folder.path, None))
    assert torch.allclose(logits_of(loaded.model), due, atol=1e-4)
    assert not torch.allclose(logits_of(plain.model), due, atol=1e-2)
    assert type(loaded.model) is type(plain.model)
    names, plain_names = (sorted(name for name, _ in model.model.named_parameters()) for model in (loaded, plain))
    assert names == plain_names


def test_a_merged_model_is_another_in_every_dtype_alike_and_refuses_its_base_models_heads(
    adapter: Make, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, base = adapter()[0], str(model_folder("qwen2"))
    merged = load_model(base, device="cpu", dtype="float32", adapter=folder.path)
    plain = load_model(base, device="cpu", dtype="float32").identity
    assert merged.name == merged.identity["name"] == "qwen2+poet"
    assert merged.identity["fingerprint"] != plain["fingerprint"]
    assert load_model(base, device="cpu", dtype="bfloat16", adapter=folder.path).identity == merged.identity
    heads = write_heads(tmp_path / "heads", {"good": random_head(1)}, plain)
    with pytest.raises(HeadMismatchError):
        HeadRegistry.load(heads, merged.identity)
    folder.write_json("adapter_config.json", base_model_name_or_path="org/qwen2", target_modules=["v_proj", "q_proj"])
    assert load_model(base, device="cpu", dtype="float32", adapter=folder.path).identity == merged.identity
    folder.write_json("adapter_config.json", lora_alpha=9)
    assert load_model(base, device="cpu", dtype="float32", adapter=folder.path).identity != merged.identity


def test_an_adapter_of_another_model_that_fits_is_told_of(
    adapter: Make, model_folder: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = adapter()[0]
    folder.write_json("adapter_config.json", base_model_name_or_path="org/other-model")
    assert load_model(str(model_folder("qwen2")), device="cpu", adapter=folder.path)
    assert "made for other-model; the model is qwen2" in caplog.text


def tensors(change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> Callable[[Folder], None]:
    def apply(folder: Folder) -> None:
        changed = {name: change(name, tensor) for name, tensor in load_file(folder.path / WEIGHTS).items()}
        kept = {name: tensor.contiguous() for name, tensor in changed.items() if tensor is not None}
        save_file(kept, folder.path / WEIGHTS, metadata={"format": "pt"})

    return apply


def settings(**values: Any) -> Callable[[Folder], None]:
    return lambda folder: folder.write_json("adapter_config.json", **values)


def pickled(folder: Folder) -> None:
    (folder.path / WEIGHTS).rename(folder.path / "adapter_model.bin")


def stranger(folder: Folder) -> None:
    held = load_file(folder.path / WEIGHTS)
    save_file({**held, "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)},
              folder.path / WEIGHTS)  # fmt: skip


REFUSED: dict[str, tuple[Callable[[Folder], object], str]] = {
    "another type": (settings(peft_type="IA3"), "of the type IA3; only LORA"),
    "another task": (settings(task_type="SEQ_CLS"), "for the task SEQ_CLS"),
    "a later setting": (settings(brand_new=3), "sets brand_new.*newer release"),
    "code": (settings(auto_mapping={"parent_library": "evil.module"}), "Python code of evil.module"),
    "a start that changes the base": (settings(init_lora_weights="pissa"), "began as 'pissa'"),
    "repeated layers": (settings(layer_replication=[[0, 2]]), "layer_replication, which cannot be merged"),
    "no number": (tensors(lambda _, tensor: tensor * float("nan")), "cannot be merged: NaN"),
    "another width": (tensors(lambda name, t: t[:, :16] if "lora_A" in name else t), r"has shape \[4, 16\]"),
    "another rank": (tensors(lambda name, t: t[:2] if "lora_A" in name else t[:, :2]), "cannot be merged"),
    "half a layer": (tensors(lambda name, t: None if "1.self_attn.q_proj.lora_B" in name else t), "lacks .*lora_B"),
    "a layer too many": (stranger, r"changes model\.layers\.9.*does not have"),
    "cut": (lambda folder: os.truncate(folder.path / WEIGHTS, 1500), r"adapter_model\.safetensors is cut"),
    "a pickle": (pickled, "only as a pickle"),
    "no weights": (lambda folder: (folder.path / WEIGHTS).unlink(), f"has no {WEIGHTS}"),
    "no config": (lambda folder: (folder.path / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "a config cut off": (lambda f: (f.path / "adapter_config.json").write_text("{"), r"adapter_config\.json is not"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_that_cannot_be_merged_rightly_is_refused_in_one_line(
    adapter: Make, model_folder: Callable[[str], Path], case: str
) -> None:
    change, words = REFUSED[case]
    folder = adapter()[0]
    change(folder)
    with pytest.raises(ModelLoadError, match=words) as caught:
        load_model(str(model_folder("qwen2")), device="cpu", dtype="float32", adapter=folder.path)
    assert str(folder.path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_embeddings_of_a_longer_vocabulary_and_tied_ones_are_refused(
    adapter: Make, model_folder: Callable[[str], Path]
) -> None:
    folder = adapter(modules_to_save=["lm_head"])[0]
    tensors(lambda name, t: torch.cat([t, t[:2]]) if "lm_head" in name else t)(folder)
    with pytest.raises(ModelLoadError, match=r"lm_head\.weight has shape \[260, 32\].*\[258, 32\]"):
        load_model(str(model_folder("qwen2")), device="cpu", adapter=folder.path)
    folder = adapter(base="llama", target_modules=["embed_tokens"])[0]
    with pytest.raises(ModelLoadError, match="embeddings and its head are the same tensor"):
        load_model(str(model_folder("llama")), device="cpu", adapter=folder.path)


def test_adapter_and_model_in_each_others_place_are_told_apart(
    adapter: Make, model_folder: Callable[[str], Path]
) -> None:
    folder, base = adapter()[0].path, model_folder("qwen2")
    with pytest.raises(ModelLoadError, match=f"Serve it with --model {base} --adapter {folder}"):
        load_model(str(folder))
    with pytest.raises(ModelLoadError, match="it is a model, which --model serves"):
        load_model(str(base), adapter=base)
    with pytest.raises(ModelLoadError, match="there is no folder gone"):
        load_model(str(base), adapter="gone")


def test_without_peft_the_extra_is_named(
    adapter: Make, model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, find = adapter()[0], importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    with pytest.raises(ModelLoadError, match=r"pip install 'recontrol\[adapters\]'"):
        load_model(str(model_folder("qwen2")), adapter=folder.path)


def test_vllm_is_given_no_adapter_and_the_reason(adapter: Make) -> None:
    with pytest.raises(ValueError, match="adapter: vLLM applies LoRA beside the weights"):
        Settings(engine="vllm", adapter=adapter()[0].path)


@pytest.mark.parametrize("command", [("serve", "--port", "0"), ("generate", "hi"), ("rollouts", "--out", "out")])
def test_commands_take_adapters(
    adapter: Make, model_folder: Callable[[str], Path], command: tuple[str, ...], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = adapter()[0]
    settings(task_type="TOKEN_CLS")(folder)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main([*command, "--model", str(model_folder("qwen2")), "--adapter", str(folder.path)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"recontrol {command[0]}: adapter: {folder.path} is for the task TOKEN_CLS")
