"""Tiny models with random weights for tests and the smoke recipe, without network access.

``write("bert", folder)`` writes a model folder as on the hub: ``config.json``,
``model.safetensors`` and the files of the tokenizer or image processor. The files of a kind are
always the same. Encoders have no head. A run therefore initializes a classification head at random,
as for a pretrained encoder.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from os import PathLike

KINDS = ("bert", "llama", "gpt2", "vit", "t5")
"""Architectures that ``write`` supports."""

_SEED = 20250409
_WIDTH = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
# About 1 / sqrt(width). The usual 0.02 suits widths near 1000. At width 32 it would make the output
# at [CLS] almost independent of the text.
_SPREAD = {"initializer_range": 0.2}
_POSITIONS = 128
_VOCABULARY = 400

_SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "My order has not arrived yet; please tell me where the parcel is.",
    "I was charged twice this month and would like a refund, thank you.",
    "The application crashes when I open the settings after the update.",
    "How do I change the password of my account? The page shows an error.",
    "She said that the film was wonderful, but the ending was too long.",
    "Name three colours of the rainbow. Red, green and blue are colours.",
    "What is the sum of two and three? The answer is five, not seven.",
)

_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '[' + message['role'] + '] ' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)


def write(kind: str, folder: str | PathLike[str]) -> Path:
    """Write a tiny model.

    The models have 2 layers of width 32. Text models have a byte-level BPE tokenizer with at most
    400 tokens, and a limit of 128 tokens per text. The image model takes 32 × 32 pixels in patches
    of 8 × 8. ``bert`` and ``vit`` have no head. ``llama`` is a causal language model with an untied
    output matrix and a chat template. ``gpt2`` is a causal language model with a tied output matrix
    and no pad token, like the original. ``t5`` has an encoder and a decoder with 2 layers each.

    The state of torch's random generators is preserved.

    Args:
        kind: bert, llama, gpt2, vit or t5.
        folder: Destination. Created if it does not exist.

    Returns:
        The folder.

    Raises:
        ValueError: ``kind`` is unknown.
    """
    import torch

    if kind not in KINDS:
        known = ", ".join(f"tiny:{known}" for known in KINDS)
        raise ValueError(f"unknown tiny model {kind!r}; choose one of {known}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    processor = _image_processor() if kind == "vit" else _tokenizer(kind)
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also seed the GPUs, which fork_rng does not restore here.
        torch.default_generator.manual_seed(_SEED)
        model = _model(kind, processor)
    # Transformers saves on rank 0 only, but here each rank has its own folder.
    model.should_save_on_this_rank = lambda _: True
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _model(kind: str, processor: Any) -> Any:
    """Create a randomly initialized model with the special tokens of the tokenizer."""
    import transformers as hf

    if kind == "vit":
        return hf.ViTModel(
            hf.ViTConfig(**_WIDTH, **_SPREAD, image_size=32, patch_size=8), add_pooling_layer=False
        )
    special = {
        name: getattr(processor, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    sizes = {"vocab_size": len(processor), "max_position_embeddings": _POSITIONS, **_SPREAD}
    if kind == "bert":
        return hf.BertModel(hf.BertConfig(**_WIDTH, **sizes, pad_token_id=special["pad_token_id"]))
    if kind == "llama":
        return hf.LlamaForCausalLM(
            hf.LlamaConfig(
                **_WIDTH, **sizes, **special, num_key_value_heads=2, tie_word_embeddings=False
            )
        )
    if kind == "t5":
        sizes = {"d_model": _WIDTH["hidden_size"], "d_kv": 8, "d_ff": _WIDTH["intermediate_size"]}
        return hf.T5ForConditionalGeneration(
            hf.T5Config(
                **sizes,
                num_layers=_WIDTH["num_hidden_layers"],
                num_heads=_WIDTH["num_attention_heads"],
                vocab_size=len(processor),
                pad_token_id=special["pad_token_id"],
                eos_token_id=special["eos_token_id"],
                decoder_start_token_id=special["pad_token_id"],
            )
        )
    width = {
        "n_embd": _WIDTH["hidden_size"],
        "n_layer": _WIDTH["num_hidden_layers"],
        "n_head": _WIDTH["num_attention_heads"],
    }
    return hf.GPT2LMHeadModel(hf.GPT2Config(**width, **sizes, **special))


def _tokenizer(kind: str) -> Any:
    """Train a byte-level BPE tokenizer with the special tokens of the architecture."""
    import tokenizers
    import transformers as hf

    special: dict[str, dict[str, str]] = {
        "bert": {
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "mask_token": "[MASK]",
        },
        "llama": {
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
        },
        "gpt2": {
            "unk_token": "<|endoftext|>",
            "bos_token": "<|endoftext|>",
            "eos_token": "<|endoftext|>",
        },
        "t5": {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"},
    }
    names = special[kind]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=list(dict.fromkeys(names.values())),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    layout = {
        "bert": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ("[CLS]", "[SEP]")),
        "llama": ("<s> $A", "<s> $A <s>:1 $B:1", ("<s>",)),
        "t5": ("$A </s>", "$A </s> $B:1 </s>:1", ("</s>",)),
    }
    if kind in layout:
        single, pair, added = layout[kind]
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=single,
            pair=pair,
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in added],
        )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=_POSITIONS,
        model_input_names=[
            "input_ids",
            *(["token_type_ids"] if kind == "bert" else []),
            "attention_mask",
        ],
        padding_side="right",
        clean_up_tokenization_spaces=False,
        **({"chat_template": _CHAT_TEMPLATE} if kind == "llama" else {}),
        **names,
    )


def _image_processor() -> Any:
    """Create ViT's Pillow image processor, which does not need torchvision."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    return ViTImageProcessorPil(
        size={"height": 32, "width": 32},
        do_convert_rgb=True,
        image_mean=[0.5, 0.45, 0.4],
        image_std=[0.25, 0.25, 0.2],
    )
