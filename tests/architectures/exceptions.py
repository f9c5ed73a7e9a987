"""What single architectures need besides the rules of `sizes`.

A dictionary under the name of a part (`text_config`) is that part's own.
"""

from __future__ import annotations

from typing import Any

from tests.architectures.sizes import VOCAB, WINDOW

_ALL_HEADS = {"num_key_value_heads": 4}
_INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 32, "indexer_budget": WINDOW,
            "indexer_compress_ratio": 4, "output_gate_type": "sigmoid", "ngram_vocab_size_base": 64,
            "make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 2, "hc_lowrank": 16}  # fmt: skip
_DOTS3 = {**_ALL_HEADS, "n_group": 1, "index_head_dim": 32}
_PADDED_VOCAB = {"vocab_size": VOCAB + 14, "unpadded_vocab_size": VOCAB}
_HYBRID = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
_MUSIC = {"text_encoder": {"model_type": "t5", "vocab_size": 64, "d_model": 32, "num_layers": 1, "d_ff": 32, "num_heads": 2},
          "audio_encoder": {"model_type": "encodec"}}

EXCEPTIONS: dict[str, dict[str, Any]] = {
    # Latent attention has as many keys as queries.
    **dict.fromkeys(
        ("axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa",
         "kimi_linear", "minicpm3", "sarvam_mla", "youtu", "longcat_flash"),
        _ALL_HEADS,
    ),
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dots3_note": {"text_config": _DOTS3},
    "dots3_note_text": _DOTS3,
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 3},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": _HYBRID, "num_hidden_layers": 4},
    "helium": {"hidden_size": 128},
    "inkling2_loop_text": {**_PADDED_VOCAB, "loop_layer_index_start": 2, "loop_layer_index_end": 4},
    "inkling2_text": _PADDED_VOCAB,
    "inkling_text": {**_PADDED_VOCAB, "logits_mup_width_multiplier": 2.0},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 3},
    "longcat_flash": {**_ALL_HEADS, "qk_rope_head_dim": 32, "qk_head_dim": 48},
    "modernbert-decoder": {"cls_token_id": 1, "sep_token_id": 2},
    "musicgen": _MUSIC,
    "musicgen_melody": _MUSIC,
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"axial_pos_embds": False},
    "roc_bert": {"pronunciation_vocab_size": 32, "shape_vocab_size": 32, "shape_embed_dim": 32, "pronunciation_embed_dim": 32},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

GAINS: dict[str, float] = {}
"""Where six times the usual weights are too large for numbers that a sum's order does not change."""
