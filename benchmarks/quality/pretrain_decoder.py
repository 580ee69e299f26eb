"""Pretrain a small Llama on English prose (public-domain books), on the CPU.

    python benchmarks/quality/pretrain_decoder.py --data DATA --minutes 15

Its tokenizer is byte-level BPE, trained on the same text.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

import pyarrow.parquet as pq
import torch
from pretraining import BFLOAT16, arguments, fit
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}


def train_tokenizer(texts: list[str], vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    begin = SPECIAL["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
        **SPECIAL,
    )


def windows(texts: list[str], tokenizer: PreTrainedTokenizerFast, context: int) -> Tensor:
    """Concatenate all texts with their begin and end tokens, and cut: ``(windows, context)``."""
    end = [tokenizer.eos_token_id]
    tokens = torch.cat(
        [torch.tensor(ids + end) for ids in tokenizer(texts, verbose=False)["input_ids"]]
    )
    return tokens[: len(tokens) // context * context].view(-1, context)


def next_token_loss(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokens: Tensor) -> float:
    model.eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
        losses = [len(part) * next_token_loss(model, part).item() for part in tokens.split(16)]
    return math.exp(sum(losses) / len(tokens))


def main() -> None:
    parser = arguments(__doc__, "decoder")
    parser.add_argument("--vocabulary", type=int, default=4000, help="size of the vocabulary")
    parser.add_argument(
        "--context", type=int, default=256, help="maximum length of a text, in tokens"
    )
    parser.add_argument("--hidden", type=int, default=256, help="hidden size")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    pretrain(parser.parse_args())


def pretrain(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    books = options.data / "lm_gutenberg.parquet"
    texts, held_out_texts = (
        pq.read_table(books, columns=["text"], filters=[("split", "==", split)])[
            "text"
        ].to_pylist()[: options.rows]
        for split in ("train", "valid")
    )
    tokenizer = train_tokenizer(texts, options.vocabulary, options.context)
    train, held_out = (
        windows(each, tokenizer, options.context) for each in (texts, held_out_texts)
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        intermediate_size=3 * options.hidden,
        max_position_embeddings=options.context,
        tie_word_embeddings=True,
        **{f"{name}_id": getattr(tokenizer, f"{name}_id") for name in SPECIAL},
    )
    model = LlamaForCausalLM._from_config(
        config, attn_implementation="eager"
    )  # on a CPU, faster here than sdpa

    def draw() -> Iterator[Tensor]:
        return (train[rows] for rows in torch.randperm(len(train)).split(options.batch_size))

    fit(
        model,
        draw,
        lambda tokens: next_token_loss(model, tokens),
        options.minutes,
        learning_rate=3e-3,
    )
    print(f"held-out perplexity {perplexity(model, held_out):.1f}")
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
