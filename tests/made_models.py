"""Folders with tiny random models of many architectures, each with the tokenizer of a tiny one."""

import json

import torch

WIDTH = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "initializer_range": 0.2,
    "max_position_embeddings": 128,
}
OTHER_NAMES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
    "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "initializer_range": 0.2},
    "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 128},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
    "recurrent_gemma": {**WIDTH, "num_hidden_layers": 3, "lru_width": 32, "head_dim": 8},
    "bart": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "max_position_embeddings": 128,
        "init_std": 0.2,
    },
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
}


def tokenizer_of(tiny_models, kind, **changes):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_models / kind, **changes)


def config_of(kind, tokenizer, **changes):
    from transformers import CONFIG_MAPPING

    special = {
        name: getattr(tokenizer, name)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        if getattr(tokenizer, name) is not None
    }
    sizes = OTHER_NAMES.get(kind, WIDTH)
    return CONFIG_MAPPING[kind](**{**sizes, "vocab_size": len(tokenizer), **special, **changes})


def write(folder, auto, config, tokenizer, **written):
    """Write a random model of a configuration, and a tokenizer.

    Args:
        folder: Destination.
        auto: Class of transformers, such as AutoModel.
        config: Configuration.
        tokenizer: Tokenizer.
        written: Values in ``config.json`` that differ.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = auto.from_config(config)
        with torch.no_grad():  # the embedding of padding is not zero
            model.get_input_embeddings().weight.normal_(0, 0.2)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if written:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **written}))
    return folder
