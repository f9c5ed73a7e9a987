"""Checkpoints of fp8 and mxfp4, which are made whole on load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from server.engines.checkpoint.model_files import ModelFiles
from server.engines.embedded.model.loader import load_model
from server.errors import ModelLoadError
from tests.conftest import byte_tokenizer
from tests.engines.checkpoint.conftest import Folder, Tensors

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def in_blocks(weight: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """fp8 values, their scales, and what they stand for."""
    rows, columns = (-(-length // size) for length in weight.shape)
    padded = torch.zeros(rows * size, columns * size)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.view(rows, size, columns, size)
    scales = blocks.abs().amax((1, 3)).clamp(min=1e-6) / 448
    values = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    whole = (values.float() * scales[:, None, :, None]).view(padded.shape)[: weight.shape[0], : weight.shape[1]]
    return values.view(padded.shape)[: weight.shape[0], : weight.shape[1]].contiguous(), scales, whole


def quantize(folder: Folder, size: int, *, scales_name: str = "weight_scale_inv") -> Tensors:
    stored, due = {}, {}
    for name, tensor in folder.tensors().items():
        stored[name], due[name] = tensor, tensor.float()
        if name.endswith("proj.weight"):
            stored[name], stored[name.replace("weight", scales_name)], due[name] = in_blocks(tensor.float(), size)
    folder.write_tensors(stored)
    folder.write_json("config.json", quantization_config={**FP8, "weight_block_size": [size, size]})
    return due


def test_fp8_in_blocks_is_what_it_stands_for_in_both_engines(copied: Callable[..., Folder]) -> None:
    folder = copied("qwen2")
    due = quantize(folder, 16)
    loaded = load_model(str(folder.path), device="cpu", dtype="float32")
    state = loaded.model.state_dict()
    assert all(torch.equal(state[name], due[name]) for name in due)
    assert ModelFiles.of(str(folder.path)).identity == loaded.identity


def test_fp8_with_one_scale_a_matrix_is_what_it_stands_for(copied: Callable[..., Folder]) -> None:
    folder = copied("qwen2")
    name, stored = "model.layers.0.mlp.up_proj.weight", folder.tensors()
    values, scales, due = in_blocks(stored[name].float(), 64)
    folder.write_tensors({**stored, name: values, f"{name}_scale_inv": scales.max().reshape(()),
                          name.replace("weight", "activation_scale"): torch.tensor(1.0)})  # fmt: skip
    folder.write_json(
        "config.json", quantization_config={**FP8, "weight_block_size": None, "activation_scheme": "static"}
    )
    assert torch.equal(load_model(str(folder.path), device="cpu", dtype="float32").model.state_dict()[name], due)


def test_fp8_in_blocks_that_do_not_divide_is_refused(copied: Callable[..., Folder]) -> None:
    """transformers would take blocks of 24 for 48: each second row would be scaled by another block's scale."""
    folder = copied("qwen2")
    quantize(folder, 24)
    with pytest.raises(ModelLoadError, match=r"blocks of 24 x 24, which do not divide .* of"):
        load_model(str(folder.path), device="cpu")


def test_fp8_with_scales_of_other_tools_is_refused(copied: Callable[..., Folder]) -> None:
    folder = copied("qwen2")
    quantize(folder, 16, scales_name="weight_scale")
    with pytest.raises(ModelLoadError, match="not named weight_scale_inv"):
        load_model(str(folder.path), device="cpu")


def test_mxfp4_is_what_it_stands_for(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    config = tf.GptOssConfig(
        vocab_size=258, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, eos_token_id=256, pad_token_id=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    tf.AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    folder, stored, due = Folder(tmp_path), {}, {}
    for name, tensor in load_file(folder.weights).items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(110, 125, blocks.shape[:3], dtype=torch.uint8, generator=generator)
        values = torch.stack([E2M1[(blocks & 15).long()], E2M1[(blocks >> 4).long()]], dim=-1).flatten(3)
        due[name] = (values * torch.exp2(scales.float() - 127)[..., None]).flatten(2).transpose(1, 2)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(stored, folder.weights, metadata={"format": "pt"})
    folder.write_json("config.json", quantization_config={"quant_method": "mxfp4"})
    state = load_model(str(tmp_path), device="cpu", dtype="float32").model.state_dict()
    assert len(due) == 2
    assert all(torch.equal(state[name], due[name]) for name in due)
