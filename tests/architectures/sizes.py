"""What makes a configuration of transformers tiny, and its traits matter, by the names of its fields.

Sizes and traits apply to every class that has the field; `EXCEPTIONS` says what single architectures need besides.
Knows nothing of weights or engines.
"""

from __future__ import annotations

from typing import Any

VOCAB, EOS, BOS = 258, 256, 257
MAX_POSITIONS = 512
WINDOW = 16
"""Of sliding windows and attention chunks; shorter than all but one of the judge's texts."""
SWITCH = 200
"""Where rotations change from the short to the long: their original_max_position_embeddings."""
LAYERS, PATTERNED_LAYERS = 4, 6
HEAD_SIZE = 32
"""What the native kernels take."""

SIZES: dict[str, Any] = {
    "is_decoder": True,
    "vocab_size": VOCAB, "eos_token_id": EOS, "bos_token_id": BOS, "pad_token_id": EOS, "sep_token_id": None,
    "cls_token_id": None, "decoder_start_token_id": BOS, "forced_eos_token_id": None, "audio_vocab_size": 32,
    "vocab_size_per_layer_input": VOCAB, "type_vocab_size": 2, "decoder_vocab_size": VOCAB,
    "max_position_embeddings": MAX_POSITIONS, "n_positions": MAX_POSITIONS, "max_seq_len": MAX_POSITIONS,
    "original_max_position_embeddings": SWITCH, "n_ctx": MAX_POSITIONS, "model_max_length": MAX_POSITIONS,
    "context_length": MAX_POSITIONS,
    "max_source_positions": 64, "max_target_positions": MAX_POSITIONS,
    "intermediate_size": 128, "ffn_dim": 128, "decoder_ffn_dim": 128, "encoder_ffn_dim": 128, "n_inner": 128,
    "d_inner": 128, "dff": 128, "dim_ff": 128, "ffn_hidden_size": 128, "feed_forward_size": 128,
    "intermediate_size_mlp": 128, "dense_intermediate_size": 128, "prefix_dense_intermediate_size": 128,
    "num_hidden_layers": LAYERS, "n_layer": LAYERS, "n_layers": LAYERS, "num_layers": LAYERS,
    "decoder_layers": LAYERS, "num_decoder_layers": LAYERS, "encoder_layers": 1, "num_encoder_layers": 1,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "attention_heads": 4, "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4, "num_key_value_heads": 2, "num_kv_heads": 2, "num_query_groups": 2,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": HEAD_SIZE,
    "head_dim": HEAD_SIZE, "kv_channels": HEAD_SIZE, "d_head": HEAD_SIZE, "dim_head": HEAD_SIZE,
    "attention_head_size": HEAD_SIZE, "rotary_dim": HEAD_SIZE // 2,
    # Latent attention.
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "qk_head_dim": 32,
    "v_head_dim": 32, "o_lora_rank": 32, "o_groups": 2, "index_head_dim": 16, "index_n_heads": 2, "index_topk": WINDOW,
    # Experts: four of which two are taken, after one dense layer.
    "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "top_k_experts": 2, "moe_topk": 2, "moe_k": 2, "n_shared_experts": 1,
    "num_shared_experts": 1, "moe_num_shared_experts": 1, "moe_intermediate_size": 32, "expert_ffn_hidden_size": 32,
    "shared_expert_intermediate_size": 32, "shared_experts_intermediate_size": 32, "shared_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32, "n_group": 2, "topk_group": 1, "num_expert_group": 2,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "moe_layer_start_index": 1, "moe_layer_end_index": 3,
    "zero_expert_num": 2, "encoder_hash_byte_group_vocab": 64,
    # State spaces and linear attention.
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_num_heads": 4, "linear_head_dim": 16, "state_size": 8, "ssm_state_size": 8, "mamba_d_state": 8,
    "mamba_n_heads": 4, "mamba_num_heads": 4, "n_mamba_heads": 2, "mamba_dt_rank": 8, "time_step_rank": 8,
    "mamba_n_groups": 1, "n_groups": 1, "mamba_ngroups": 1, "chunk_size": 16, "mamba_chunk_size": 16,
    "num_nextn_predict_layers": 0, "num_mtp_layers": 0, "laurel_rank": 16, "router_hidden_size": 32,
    "hidden_size_per_layer_input": 16,
    "initializer_range": 0.02,
    # Towers of other kinds of input, which no text reaches.
    "image_size": 28, "patch_size": 14, "depth": 1, "out_hidden_size": 64,
}  # fmt: skip

TRAITS: dict[str, Any] = {
    "tie_word_embeddings": False,
    "sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 2, "sliding_window_size": WINDOW,
    "attention_window_size": WINDOW, "window_size": WINDOW, "attention_chunk_size": WINDOW, "local_attention": WINDOW,
    "keep_window_size": WINDOW, "local_attention_window_len": WINDOW, "chunk_size_feed_forward": 0,
    "attention_bias": True, "mlp_bias": True, "use_bias": True, "qkv_bias": True, "use_qkv_bias": True, "bias": True,
    "lm_head_bias": True, "attention_out_bias": True, "norm_bias": True, "add_bias_linear": True,
    "final_logit_softcapping": 5.0, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 20,
    "moe_router_logit_softcapping": 3.0, "clip_qkv": 1.5, "use_qk_norm": True, "qk_layernorm": True,
    "logit_scale": 0.5, "logits_scaling": 2.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.6,
    "attention_multiplier": 0.3, "lm_head_multiplier": 0.7, "attention_value_scale": 0.707,
    "routed_scaling_factor": 1.5, "router_scaling_factor": 1.5, "moe_routed_scaling_factor": 1.5, "route_scale": 1.5,
    "norm_topk_prob": True, "floor_scale": WINDOW, "log_scaling_n_floor": WINDOW,
    "rms_norm_eps": 1e-3, "layer_norm_eps": 1e-3, "layer_norm_epsilon": 1e-3, "norm_eps": 1e-3, "norm_epsilon": 1e-3,
    "scale_embedding": True, "mup_enabled": True, "attention_k_eq_v": False,
    # Regularisation is for training.
    "router_jitter_noise": 0.0, "input_jitter_noise": 0.0,
}  # fmt: skip
