"""What a model does is asked of it, and no model is served whose numbers would not be transformers' own."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedConfig

from server.engines.checkpoint.tokenizer import placeholder_ids
from server.engines.checks import check_is_text
from server.engines.embedded.model import attention, llama
from server.engines.embedded.model.layout import DecodeRow, PromptChunk
from server.engines.embedded.model.lm_head import LMHead
from server.engines.embedded.model.runner import ModelRunner
from server.engines.embedded.model.spans import ALL_BEFORE, AttentionKind, Span
from server.engines.embedded.model.steady import Steady
from server.engines.embedded.model.takeover import takeover
from server.engines.embedded.model.takeover.facts import ask
from server.engines.embedded.model.takeover.rotation import static_length
from server.engines.embedded.model.takeover.stand_in import short_spans
from server.errors import InvalidRequestError, ModelLoadError
from server.kernels import native
from server.types import GenerationRequest, SamplingParams

_SIZES = {"vocab_size": 258, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
          "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
          "bos_token_id": 257, "eos_token_id": 256, "pad_token_id": 256}  # fmt: skip
needs_native = pytest.mark.skipif(native() is None, reason="no native kernels on this machine")


def config(name: str, **traits: Any) -> PreTrainedConfig:
    return getattr(transformers, f"{name}Config")(**{**_SIZES, **traits})


def tiny(name: str, dtype: torch.dtype = torch.float32, **traits: Any) -> Any:
    """Large weights, so that attention and every trait of it matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(name, **traits))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0 if parameter.dim() > 1 else 1.0)
    return model.to(dtype).eval().requires_grad_(False)


def create(model: Any) -> ModelRunner:
    return ModelRunner.create(model, max_len=512, max_sequences=2, kv_bytes=2**24)


def spans(model: Any) -> list[Span]:
    with torch.inference_mode():
        return [fact.kind.span for fact in ask(model.get_decoder(), 512).values()]


def logits(runner: ModelRunner, text: list[int], cut: int) -> torch.Tensor:
    """Of a prompt in two chunks and a decode row."""
    pages = list(range(1, 5))
    parts = [
        runner.forward([], [PromptChunk(pages, 0, text[:cut])]),
        runner.forward([], [PromptChunk(pages, cut, text[cut:-1])]),
        runner.forward([DecodeRow(pages, len(text) - 1, text[-1])], []),
    ]
    return runner.lm_head.logits(torch.cat(parts))


def test_windows_are_read_from_the_masks_that_the_model_makes() -> None:
    assert spans(tiny("Mistral", sliding_window=16)) == [Span(window=16)] * 4
    assert spans(tiny("Mistral", sliding_window=None)) == [ALL_BEFORE] * 4
    assert spans(tiny("Gemma2", sliding_window=200)) == [Span(window=200), ALL_BEFORE] * 2
    # As long as the longest text is none.
    assert spans(tiny("Mistral", sliding_window=512)) == [ALL_BEFORE] * 4


def test_chunks_and_layers_that_do_not_rotate_are_known() -> None:
    llama4 = tiny("Llama4Text", attention_chunk_size=24, intermediate_size_mlp=128, num_local_experts=2,
                  no_rope_layers=[1, 1, 1, 0])  # fmt: skip
    with torch.inference_mode():
        facts = ask(llama4.model, 512)
    assert [fact.kind.span for fact in facts.values()] == [Span(chunk=24)] * 3 + [ALL_BEFORE]
    with torch.inference_mode():
        rotating = [fact.rotates for fact in ask(tiny("SmolLM3").model, 512).values()]
    assert rotating == [True, True, True, False]


def test_scalings_caps_and_sinks_are_those_that_attention_is_called_with() -> None:
    with torch.inference_mode():
        granite = ask(tiny("Granite", attention_multiplier=0.4).model, 512)[0]
        gemma = ask(tiny("Gemma2", attn_logit_softcapping=7.0, query_pre_attn_scalar=25).model, 512)[1]
        gpt_oss = ask(tiny("GptOss", num_local_experts=4).model, 512)[0]
    assert granite.kind.scaling == 0.4
    assert (gemma.kind.scaling, gemma.kind.softcap) == (0.2, 7.0)
    assert gpt_oss.has_sinks


@pytest.mark.parametrize("window", [16, 70, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_beyond_its_window_a_model_has_transformers_numbers(window: int, dtype: torch.dtype) -> None:
    text = [(7 * i) % 250 for i in range(230)]
    with torch.inference_mode():
        exact = tiny("Mistral", sliding_window=window)(torch.tensor([text])).logits[0]
        rounded = tiny("Mistral", dtype, sliding_window=window)(torch.tensor([text])).logits[0].float()
    runner = create(tiny("Mistral", dtype, sliding_window=window))
    assert runner.is_native == (dtype == torch.bfloat16 and native() is not None)
    error, noise = ((given - exact).norm(dim=1) for given in (logits(runner, text, 97), rounded))
    assert error.max() <= max(1.5 * float(noise.max()), 1e-3)
    assert error.mean() <= max(1.2 * float(noise.mean()), 1e-4)


@pytest.mark.parametrize("window", [16, 200])
def test_attention_that_forgets_a_window_is_refused(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = attention.attention_kind

    def forgetful(*arguments: Any) -> AttentionKind:
        return replace(plain(*arguments), span=ALL_BEFORE)

    monkeypatch.setattr(attention, "attention_kind", forgetful)
    with pytest.raises(ModelLoadError, match=r"would not be transformers' own \((the attention of )?layer \d"):
        create(tiny("Mistral", sliding_window=window))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "traits"),
    [("GptOss", {"num_local_experts": 4}), ("Mistral", {"sliding_window": 16}), ("Gemma2", {"head_dim": 24}),
     ("DeepseekV3", {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
                     "moe_intermediate_size": 32, "qk_nope_head_dim": 24, "qk_rope_head_dim": 16,
                     "v_head_dim": 32, "kv_lora_rank": 16, "q_lora_rank": 16, "head_dim": 16}),
     ("Llama", {"head_dim": 10})],
)  # fmt: skip
def test_where_there_are_kernels_every_model_attends_by_them(
    name: str, traits: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_attend_without_native", lambda *_: pytest.fail("attended by torch"))
    create(tiny(name, dtype, **traits))


@needs_native
@pytest.mark.parametrize(("name", "traits"), [("SmolLM3", {}), ("Mistral", {"sliding_window": 200}), ("Llama", {})])
def test_native_layers_that_do_something_else_are_not_used(
    name: str, traits: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make = llama._layer

    def wrong(index: int, layer: Any, facts: Any, bits: Any) -> Any:
        made = make(index, layer, facts, bits)
        return replace(made, rotates=not made.rotates) if index == 3 else made

    assert create(tiny(name, torch.bfloat16, **traits)).is_native
    monkeypatch.setattr(llama, "_layer", wrong)
    with caplog.at_level(logging.INFO):
        assert not create(tiny(name, torch.bfloat16, **traits)).is_native
    assert re.search(r"through transformers' modules, since natively the (queries|keys) of layer 3 ", caplog.text)


@needs_native
def test_native_layers_that_forget_a_window_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    plain: Any = llama.attend_natively

    def forgetful(*arguments: Any) -> None:
        plain(*arguments[:-1], replace(arguments[-1], span=ALL_BEFORE))

    monkeypatch.setattr(llama, "attend_natively", forgetful)
    assert not create(tiny("Mistral", torch.bfloat16, sliding_window=200)).is_native


@needs_native
@pytest.mark.parametrize(
    ("name", "traits"),
    [("Olmo", {}), ("Granite", {"residual_multiplier": 0.3}), ("Granite", {"embedding_multiplier": 3.0}),
     ("Qwen3", {}), ("Gemma", {}), ("Helium", {}), ("Glm", {}), ("Cohere", {}), ("Qwen2Moe", {"mlp_only_layers": [0]}),
     ("Ernie4_5_Moe", {"moe_layer_start_index": 1}), ("Llama", {"hidden_act": "gelu"}), ("Phi3", {}),
     ("Nemotron", {}), ("StableLm", {"use_qkv_bias": True})],
)  # fmt: skip
def test_models_that_only_look_like_llama_run_through_transformers_modules(name: str, traits: dict[str, Any]) -> None:
    assert not create(tiny(name, torch.bfloat16, **traits)).is_native


@needs_native
def test_a_bias_that_only_some_maps_have_is_kept() -> None:
    text = [(7 * i) % 250 for i in range(90)]
    torch.manual_seed(1)
    models = [tiny("Llama", dtype) for dtype in (torch.bfloat16, torch.float32)]
    for index, layer in enumerate(models[0].model.layers):
        layer.self_attn.k_proj.bias = nn.Parameter(torch.randn(64).bfloat16(), requires_grad=False)
        models[1].model.layers[index].self_attn.k_proj.bias = nn.Parameter(layer.self_attn.k_proj.bias.float())
    with torch.inference_mode():
        exact = models[1](torch.tensor([text])).logits[0]
    runner = create(models[0])
    assert runner.is_native
    assert (logits(runner, text, 33) - exact).norm() < 0.05 * exact.norm()


def test_a_model_that_scales_queries_by_the_length_of_a_cache_is_refused_also_where_no_short_text_shows_it() -> None:
    model = tiny("Llama4Text", attention_chunk_size=24, intermediate_size_mlp=128, num_local_experts=2,
                 no_rope_layers=[1, 1, 1, 0], attn_temperature_tuning=True, floor_scale=300)  # fmt: skip
    with pytest.raises(ModelLoadError, match="layer 3 counts positions by the length of a cache"):
        create(model)


def test_layers_that_carry_a_state_of_their_own_are_named() -> None:
    hybrid = tiny("Lfm2", layer_types=["conv", "full_attention"] * 2)
    with pytest.raises(ModelLoadError, match=r"2 of its 4 layers do not attend \(Lfm2ShortConv\)"):
        create(hybrid)
    with pytest.raises(ModelLoadError, match=r"none of its layers attends .* \(a layer has MambaRMSNorm, MambaMixer\)"):
        create(AutoModelForCausalLM.from_config(transformers.MambaConfig(vocab_size=258, hidden_size=32,
                                                                         num_hidden_layers=2)).eval())  # fmt: skip


def test_short_spans_are_put_back() -> None:
    model = tiny("Gemma2", sliding_window=200)
    with short_spans(model, {200: 20}):
        assert spans(model) == [Span(window=20), ALL_BEFORE] * 2
    assert spans(model) == [Span(window=200), ALL_BEFORE] * 2


@pytest.mark.parametrize(
    ("rope", "length"),
    [({"rope_type": "default"}, 512), ({"rope_type": "linear", "factor": 4.0}, 512),
     ({"rope_type": "dynamic", "factor": 4.0}, 512), ({"rope_type": "yarn", "factor": 4.0}, 512),
     ({"rope_type": "longrope", "factor": 16.0, "short_factor": [1.0] * 16, "long_factor": [3.0] * 16,
       "original_max_position_embeddings": 32}, 32)],
)  # fmt: skip
def test_a_rotation_is_known_up_to_where_it_changes(rope: dict[str, Any], length: int) -> None:
    model = tiny("Llama", rope_parameters={"rope_theta": 10_000.0, **rope})
    assert static_length(model, 512) == length


@pytest.mark.parametrize(
    ("name", "traits", "scale"),
    [("Cohere", {"logit_scale": 0.3}, 0.3), ("Granite", {"logits_scaling": 4.0}, 0.25), ("Llama", {}, 1.0),
     ("Gemma2", {"final_logit_softcapping": 5.0}, 1.0), ("MiniCPM3", {"dim_model_base": 16, "q_lora_rank": 32,
      "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32}, 0.25)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_own_scale_and_cap_are_found(
    name: str, traits: dict[str, Any], scale: float, dtype: torch.dtype
) -> None:
    head = create(tiny(name, dtype, **traits)).lm_head
    assert head._scale == pytest.approx(scale, rel=1e-5)
    assert head.is_linear == (name != "Gemma2")


def test_a_head_of_other_logits_is_as_near_as_it_comes() -> None:
    torch.manual_seed(0)
    linear, states = nn.Linear(16, 50).requires_grad_(False), torch.randn(30, 16)
    head = LMHead.like(linear, object.__new__(PreTrainedConfig), states, 2.7 * linear(states))
    torch.testing.assert_close(head.logits(states), 2.7 * linear(states))


@pytest.mark.parametrize("name", ["Qwen2Moe", "Mixtral", "GptOss", "DeepseekV3"])
def test_experts_and_what_chooses_them_give_a_row_the_same_bits_beside_any_others(name: str) -> None:
    traits: dict[str, Any] = {"num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
                              "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 32,
                              "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32,
                              "moe_intermediate_size": 40, "shared_expert_intermediate_size": 40}  # fmt: skip
    if name == "DeepseekV3":
        traits |= {"head_dim": 32}
    runner = create(tiny(name, **traits))
    text = [(11 * i) % 250 for i in range(60)]
    whole = runner.forward([], [PromptChunk([1], 0, text)])
    last = DecodeRow([1], 59, text[59])
    alone = runner.forward([last], [])
    beside = runner.forward([last], [PromptChunk([2], 0, text[:7]), PromptChunk([3], 0, text)])
    assert torch.equal(beside[:1], alone)
    assert torch.equal(beside[8:], whole)


@pytest.mark.parametrize("width", [1, 7, 64, 96, 1000])
@pytest.mark.parametrize("function", [functional.silu, functional.gelu, torch.sigmoid, functional.softplus, torch.tanh])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_an_exponential_of_a_row_is_the_same_among_any_others(
    function: Callable[[torch.Tensor], torch.Tensor], width: int, num_threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            x = 4 * torch.randn(90_000 // width + 3, width, generator=torch.Generator().manual_seed(0)).to(dtype)
            with Steady():
                whole, some = function(x), function(x[5:12])
                assert torch.equal(whole[5:12], some)
                assert torch.equal(whole[7:8], function(x[7:8]))
    finally:
        torch.set_num_threads(before)


def test_no_part_of_the_proof_is_left_on_the_model() -> None:
    model = tiny("Gemma2", sliding_window=200)
    create(model)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert takeover.register_attention() == model.config._attn_implementation


@needs_native
@pytest.mark.parametrize(("beta", "is_native"), [(0.0, True), (0.1, False)])
def test_native_layers_are_not_used_where_queries_grow_with_their_position(beta: float, is_native: bool) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 128,
            "llama_4_scaling_beta": beta}  # fmt: skip
    assert create(tiny("Ministral3", torch.bfloat16, rope_parameters=rope)).is_native == is_native


@pytest.mark.parametrize("name", ["FalconH1", "RecurrentGemma"])
def test_a_layer_that_attends_and_carries_a_state_too_is_refused_however_little_it_carries(name: str) -> None:
    torch.manual_seed(0)
    small = {**_SIZES, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_chunk_size": 16}
    model = AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**small))
    with pytest.raises(ModelLoadError, match="what they carry from token to token is not kept here"):
        create(model.to(torch.bfloat16).eval().requires_grad_(False))


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 0.0}, {"rope_type": "linear", "factor": 0.0}])
def test_angles_that_are_no_numbers_are_refused(rope: dict[str, Any]) -> None:
    model = tiny("Llama", rope_parameters={"rope_theta": 10_000.0, **rope})
    with pytest.raises(ModelLoadError, match="gives angles that are not finite"):
        static_length(model, 512)


def test_a_placeholder_of_a_picture_is_refused_in_a_prompt() -> None:
    whole = transformers.Gemma3Config(image_token_id=77)
    assert placeholder_ids(whole) >= {77}
    assert placeholder_ids(whole.get_text_config()) == frozenset()
    with pytest.raises(InvalidRequestError, match="token id 77 stands for what is no text"):
        check_is_text(GenerationRequest("r", (1, 77), SamplingParams()), placeholder_ids(whole))
