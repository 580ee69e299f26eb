"""Tiny models of every architecture of transformers with one of the three heads."""

from __future__ import annotations

import inspect

import torch
import transformers as hf
from transformers.models.auto import modeling_auto

HEADS = {
    "sequence-classification": (
        hf.AutoModelForSequenceClassification,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    "causal-lm": (hf.AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "image-classification": (
        hf.AutoModelForImageClassification,
        modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    ),
}
"""Auto class and names of architectures, by task."""

MAX_PARAMETERS = 15_000_000

_WIDTH, _HALF, _LAYERS, _AHEAD = 32, 16, 2, 4
_SIZES = {
    **dict.fromkeys(
        [
            "hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "embed_dim",
        ],
        _WIDTH,
    ),
    **dict.fromkeys(
        [
            "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers",
            "decoder_layers", "num_decoder_layers",
        ],
        _LAYERS,
    ),
    **dict.fromkeys(
        [
            "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
            "decoder_attention_heads",
        ],
        _AHEAD,
    ),
    **dict.fromkeys(
        [
            "intermediate_size", "hidden_dim", "d_inner", "d_ff", "n_inner", "ffn_dim", "dff",
            "encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size",
        ],
        2 * _WIDTH,
    ),
    **dict.fromkeys(
        [
            "head_dim", "d_kv", "rotary_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim",
        ],
        8,
    ),
    **dict.fromkeys(
        ["max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length"], 128
    ),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts"], 4),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], _WIDTH),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank"], _HALF),
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "vocab_size": 400,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.2,
    "init_std": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "decoder_start_token_id": 2,
}  # fmt: skip
"""Values by the names that configurations use."""


def config_of(kind):
    """Return a tiny configuration of a model type."""
    return _shrunk(hf.CONFIG_MAPPING[kind], SPECIAL.get(kind, {}))


def build(task, config):
    """Return a randomly initialized model; raise ``ValueError`` if it is not tiny."""
    auto, names = HEADS[task]
    if not isinstance(name := names[config.model_type], str):  # several classes for one type
        config.architectures = [name[0]]
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    return auto.from_config(config).eval()


def _shrunk(kind, special):
    names = set(inspect.signature(kind.__init__).parameters)
    names |= set(getattr(kind, "__dataclass_fields__", {}))
    default = kind()
    values = {
        name: value
        for name, value in _SIZES.items()
        if name in names and not isinstance(getattr(default, name, None), list | tuple)
    }
    for name, nested in getattr(kind, "sub_configs", {}).items():
        own = type(getattr(default, name, None)) if nested is hf.AutoConfig else nested
        if issubclass(own, hf.PretrainedConfig):
            values[name] = _shrunk(own, special.get(name, {}))
            special = {key: value for key, value in special.items() if key != name}
    return kind(**{**values, **special})


_STAGES = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
_HEADS_OF_STAGES = {**_STAGES, "num_attention_heads": [1, 1, 2, 2]}
_WINDOWS = {
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [1, 2],
    "window_size": 2,
    "patch_size": 4,
}
_LATENT = {"num_key_value_heads": 4}
_HYBRID = {"mamba_n_heads": 8, "mamba_d_head": 8}
_MIXED = {"num_hidden_layers": 4}
_MIXED_TEXT = {"text_config": _MIXED}
_NARROW = {**_STAGES, "embedding_size": 8, "num_groups": 4}
SPECIAL = {
    **{key: {**_STAGES, "patch_size": 4} for key in ["convnext", "convnextv2"]},
    **dict.fromkeys(["hgnet_v2", "poolformer"], _STAGES),
    **dict.fromkeys(["bit", "resnet"], _NARROW),
    "regnet": {**_STAGES, "embedding_size": 8, "groups_width": 8},
    "cvt": {"embed_dim": [8, 8, 16], "num_heads": [1, 1, 2], "depth": [1, 1, 2]},
    **dict.fromkeys(["pvt", "pvt_v2", "segformer"], _HEADS_OF_STAGES),
    **dict.fromkeys(["donut-swin", "swin", "swinv2"], _WINDOWS),
    "hiera": {
        "image_size": [32, 32], "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2],
    },
    "levit": {
        "hidden_sizes": [16, 32, 32], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1],
        "key_dim": [8, 8, 8], "patch_size": 16,
    },
    "focalnet": {"embed_dim": 8, "depths": [1, 1], "hidden_sizes": [8, 16]},
    "imagegpt": {"vocab_size": 17},
    "perceiver": {"d_model": 32, "d_latents": 32, "num_latents": 8},
    **dict.fromkeys(
        [
            "axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite",
            "glm_moe_dsa", "minicpm3", "mistral4", "youtu",
        ],
        _LATENT,
    ),
    **dict.fromkeys(
        [
            "qwen3_5_text", "qwen3_next", "qwen3_5_moe_text", "qwen4_exp_text", "kimi_linear",
            "lfm3", "recurrent_gemma",
        ],
        _MIXED,
    ),
    **dict.fromkeys(["qwen3_5", "qwen3_5_moe", "qwen4_exp"], _MIXED_TEXT),
    "bamba": {**_HYBRID, "attn_layer_indices": [1]},
    "granitemoehybrid": {**_HYBRID, "layer_types": ["mamba", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "dots1": {"num_key_value_heads": 4, "n_shared_experts": 1},
    "zaya": {"num_experts_per_tok": 1},
    "jamba": {"num_hidden_layers": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "esmc": {"num_key_value_heads": 4},
    "reformer": {
        "axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 16), "is_decoder": True,
        "attention_head_size": 8,
    },
    "luke": {"entity_vocab_size": 50},
    "t5": {"decoder_start_token_id": 2},
    "dbrx": {"attn_config": {"kv_n_heads": 2}},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "longformer": {"attention_window": 4},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8},
    "lilt": {"hidden_size": 48},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3},
}  # fmt: skip
"""Other values of single architectures, by model type."""


def clustered():
    """Return ImageGPT's processor with the colors of 16 tokens."""
    colors = torch.rand(16, 3, generator=torch.manual_seed(0)).mul(2).sub(1).tolist()
    return hf.ImageGPTImageProcessorPil(clusters=colors, size={"height": 8, "width": 8})


SPECIAL_PROCESSORS = {
    "imagegpt": clustered,
    "siglip2": lambda: hf.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16),
}
"""Image processors of models that do not read pixels ``(3, height, width)``."""
