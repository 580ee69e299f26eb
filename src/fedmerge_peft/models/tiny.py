"""Tiny models with random weights, in the form the hub has: for tests and the smoke recipe, with no network.

``write("bert", folder)`` leaves what ``AutoModel…from_pretrained(folder)`` and ``AutoTokenizer`` (or ``AutoImageProcessor``)
expect: ``config.json``, ``model.safetensors`` and the files of the tokenizer or image processor. The same kind gives the same
files each time. Encoders are written without a head, so that a classification head starts fresh, as with a pretrained model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from os import PathLike

KINDS = ("bert", "llama", "gpt2", "vit")
"""Architectures that ``write`` knows."""

_SEED = 20250409
_WIDTH = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
# About 1 / sqrt(width). The usual 0.02 belongs to widths near 1000; at 32 a [CLS] token would hardly see the text.
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
    "{{ bos_token }}{% for message in messages %}{{ '[' + message['role'] + '] ' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)


def write(kind: str, folder: str | PathLike[str]) -> Path:
    """Write a tiny model into a folder, made where it does not exist.

    The models have 2 layers of width 32. Text goes through a byte-level BPE of 400 tokens at most, over at most 128 positions;
    images are 32 × 32 in patches of 8 × 8. ``bert`` and ``vit`` are headless; ``llama`` (own output matrix, a chat template)
    and ``gpt2`` (tied output matrix, no pad token, as the real one) are causal language models.

    Torch's random numbers go on as if nothing had been drawn.

    Args:
        kind: bert, llama, gpt2 or vit.
        folder: Where to write.

    Returns:
        The folder.

    Raises:
        ValueError: For another kind.
    """
    import torch

    if kind not in KINDS:
        raise ValueError(f"no tiny model is called {kind!r}; there are {', '.join(KINDS)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    processor = _image_processor() if kind == "vit" else _tokenizer(kind)
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed the GPUs' generators too, which fork_rng leaves alone here.
        torch.default_generator.manual_seed(_SEED)
        model = _model(kind, processor)
    model.should_save_on_this_rank = lambda _: (
        True
    )  # of several ranks, transformers lets the first write alone; here each has a folder
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _model(kind: str, processor: Any) -> Any:
    """A freshly initialised model of this kind; its special tokens are the tokenizer's."""
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
    width = {
        "n_embd": _WIDTH["hidden_size"],
        "n_layer": _WIDTH["num_hidden_layers"],
        "n_head": _WIDTH["num_attention_heads"],
    }
    return hf.GPT2LMHeadModel(hf.GPT2Config(**width, **sizes, **special))


def _tokenizer(kind: str) -> Any:
    """Byte-level BPE trained on the sentences above, with the special tokens of the architecture."""
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
    """ViT's image processor on Pillow; the torchvision one would need torchvision."""
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    return ViTImageProcessorPil(
        size={"height": 32, "width": 32},
        do_convert_rgb=True,
        image_mean=[0.5, 0.45, 0.4],
        image_std=[0.25, 0.25, 0.2],
    )
