"""What single architectures need besides the rules of `sizes`.

A dictionary under the name of a part (`text_config`) is that part's own.
"""

from __future__ import annotations

from typing import Any

from tests.architectures.sizes import VOCAB, WINDOW

_ALL_HEADS = {"num_key_value_heads": 4}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 32,
    "indexer_budget": WINDOW,
    "indexer_compress_ratio": 4,
    "output_gate_type": "sigmoid",
    "ngram_vocab_size_base": 64,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 2,
    "hc_lowrank": 16,
}
_DOTS3 = {
    **_ALL_HEADS,
    "n_group": 1,
    "index_head_dim": 32,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 32,
    "swa_kv_lora_rank": 32,
    "swa_head_dim": 32,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 32,
}
# Fewer logits than the embedding has rows.
_PADDED_VOCAB = {"vocab_size": VOCAB + 14, "unpadded_vocab_size": VOCAB}
_HYBRID = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
_BOTH = ["full_attention", "sliding_attention"] * 3
_CONVOLUTIONS = ["conv", "full_attention"] * 3

EXCEPTIONS: dict[str, dict[str, Any]] = {
    # Latent attention has as many keys as queries.
    **dict.fromkeys(
        ("axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa",
         "kimi_linear", "minicpm3", "sarvam_mla", "youtu"),
        _ALL_HEADS,
    ),
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_config": {"hidden_size_global": 128}, "decoder_config": {"hidden_size_global": 128}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 1.5, "kv_n_heads": 2},
             "ffn_config": {"hidden_size": 128, "moe_top_k": 2}},
    "dory": {"ngpt_alpha_init": 0.6, "n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2},
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"per_layer_config": {}, "mlp_bias": False, "adapter_in_dim": 128, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots3_note_text": _DOTS3,
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 3},
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0,
                                         "vocab_size_per_layer_input": 0}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": _HYBRID, "num_hidden_layers": 4},
    "helium": {"hidden_size": 128},
    "inkling2_loop_text": {**_PADDED_VOCAB, "n_layers_per_attn_res_block": 2, "loop_layer_index_start": 2,
                           "loop_layer_index_end": 4},
    "inkling2_text": _PADDED_VOCAB,
    "inkling_text": {**_PADDED_VOCAB, "logits_mup_width_multiplier": 2.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {"layer_types": _BOTH},
    "lfm2": {"layer_types": _CONVOLUTIONS},
    "lfm2_moe": {"layer_types": _CONVOLUTIONS},
    "longcat_flash": {**_ALL_HEADS, "qk_rope_head_dim": 32, "qk_head_dim": 48},
    "mellum": {"layer_types": _BOTH},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 3,
        "index_block_size": 4,
        "index_topk_blocks": 4,
    },
    "ministral": {"layer_types": _BOTH},
    "modernbert-decoder": {"cls_token_id": 1, "sep_token_id": 2},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"axial_pos_embds": False},
    "roc_bert": {"pronunciation_vocab_size": VOCAB, "shape_vocab_size": VOCAB, "shape_embed_dim": 32,
                 "pronunciation_embed_dim": 32},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"] * 3},
}  # fmt: skip

OTHERS: dict[str, dict[str, dict[str, Any]]] = {
    "falcon": {
        "alibi": {"alibi": True},
        "new": {"new_decoder_architecture": True},
        "sequential": {"parallel_attn": False},
    },
    "gemma3_text": {"bidirectional": {"use_bidirectional_attention": True}},
    "gpt2": {"scaled": {"scale_attn_by_inverse_layer_idx": True}, "upcast": {"reorder_and_upcast_attn": True}},
    "gpt_bigcode": {"heads": {"multi_query": False}},
    "gpt_neox": {"sequential": {"use_parallel_residual": False}},
    "granitemoehybrid": {"attention": {"layer_types": ["full_attention"] * 4}},
    "lfm2": {"attention": {"layer_types": ["full_attention"] * 6}},
    "llama": {"unbiased": {"attention_bias": False, "mlp_bias": False}, "gelu": {"hidden_act": "gelu"}},
    "lfm2_moe": {"attention": {"layer_types": ["full_attention"] * 6}},
    "opt": {"post_norm": {"do_layer_norm_before": False}, "projected": {"word_embed_proj_dim": 64}},
    "qwen2": {"unwindowed": {"use_sliding_window": False}},
    "stablelm": {"parallel": {"use_parallel_residual": True}},
}  # fmt: skip
"""Variants of single architectures, by what they set."""

GAINS: dict[str, float] = {"dory": 40.0}
"""Where six times the usual weights are too little or too much."""
