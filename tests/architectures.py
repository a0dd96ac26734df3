"""Makes a tiny config of any causal architecture that transformers has."""

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from tests import tiny

SMALL: dict[str, int] = {
    # widths
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embedding_size": 32, "word_embed_proj_dim": 32,
    "emb_dim": 32, "hidden_dim": 32, "intermediate_size": 48, "ffn_dim": 48, "n_inner": 48, "dim_ff": 48,
    "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "dff": 48, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16, "shared_intermediate_size": 16, "intermediate_size_mlp": 48,
    "expert_ffn_hidden_size": 16, "ffn_hidden_size": 48, "dense_intermediate_size": 48,
    # layers and heads
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "n_head": 4, "num_attention_heads": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "n_heads": 4,
    "num_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    # experts
    "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_k": 2, "moe_topk": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
    "num_shared_experts": 1,
    # tokens
    "vocab_size": tiny.VOCABULARY, "max_position_embeddings": 128, "n_positions": 128, "max_seq_len": 128,
    "sliding_window": 8, "pad_token_id": 0, "bos_token_id": tiny.BOS, "eos_token_id": tiny.EOS, "decoder_start_token_id": 0,
}  # fmt: skip


OPTIONAL = ("head_dim", "pad_token_id", "sliding_window", "num_key_value_heads", "num_experts_per_tok")
"""Keys that are set even if the architecture's default config has None for them."""

OWN: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 4, "mamba_d_state": 8, "attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10_000.0}}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "topk_group": 1, "n_group": 1},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": 258,
        "laurel_rank": 4,
        "hidden_size_per_layer_input": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "intermediate_size": [48] * 4,
    },
    "gemma4_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": 258,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_state": 8, "layer_types": ["mamba", "attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "state_size": 8, "n_groups": 1},
    "ministral3": {  # queries grow with their position, from the 8th on
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 16.0,
            "original_max_position_embeddings": 8,
            "llama_4_scaling_beta": 0.5,
        }
    },
    "phimoe": {"sliding_window": None},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "prophetnet": {"num_encoder_layers": 2, "num_decoder_layers": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": (8, 24), "axial_pos_shape": (8, 16)},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "hybrid", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "n_mamba_heads": 2,
    },
    "zamba2": {"layers_block_type": ["mamba", "hybrid"]},
}
"""Further values that single architectures need, by model_type."""


UNMADE = {
    "blt": "large",
    "dbrx": "its config has no rope_theta for its attention",
    "dots3_note": "its layers are listed by number",
    "gemma3n": "needs timm",
    "gemma4_assistant": "reads another model's states",
    "gemma4_unified_assistant": "reads another model's states",
    "musicgen": "makes music",
    "musicgen_melody": "makes music",
    "qwen4_exp": "its indexer has no default sizes",
    "qwen4_exp_text": "its indexer has no default sizes",
}
"""Architectures for which this file cannot make a tiny model, and why."""

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": tiny.VOCABULARY, "max_position_embeddings": 128, "bos_token_id": tiny.BOS, "eos_token_id": tiny.EOS,
}  # fmt: skip
"""The sizes of a tiny model of the Llama family."""


def tiny_config(kind: str) -> PreTrainedConfig:
    base = CONFIG_MAPPING[kind]()
    return type(base)(**_changes(base))


def _changes(config: Any) -> dict[str, Any]:
    fields = type(config).__dataclass_fields__
    sizes = SMALL | ({"num_key_value_heads": 4, "head_dim": 8} if "kv_lora_rank" in fields else {})
    found: dict[str, Any] = {}
    for key, value in sizes.items():
        if key not in fields:
            continue
        now = config.__dict__.get(key)
        if isinstance(now, list | dict | bool):
            continue
        if now is not None or key in OPTIONAL:
            found[key] = value
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None:
            found[name] = type(part)(**_changes(part))
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or []))
    if len(kinds) > 1 and "layer_types" in fields:
        found["layer_types"] = kinds[:2]
    return found | OWN.get(config.model_type, {})
