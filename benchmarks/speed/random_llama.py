"""Random Llamas of any size, drawn and written layer by layer in the dtype in which they are used.

The largest tensor in memory at a time is one layer or one embedding: 1 GB for 8 billion parameters
in bfloat16, whose files have 16 GB in all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "tie_word_embeddings": False,
}
"""Shape of Llama 3 8B: 8.03 billion parameters."""
_SPREAD = 0.02
"""Standard deviation of the weights, as transformers initializes them."""


def write(folder: Path, sizes: Mapping[str, int], dtype: torch.dtype, device: str) -> str:
    """Write a Llama with random weights, and the tokenizer of the tiny one, unless it is there.

    Args:
        folder: Folder of the model. It appears when all files are complete.
        sizes: Values of the configuration; embeddings are tied unless they say otherwise.
        dtype: Number format of the weights.
        device: Device on which the weights are drawn.

    Returns:
        The folder.

    Raises:
        OSError: The disk has too little space.
    """
    from transformers import LlamaConfig

    from fedmerge_peft.models import tiny

    if folder.exists():
        return str(folder)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    tiny.write("llama", partial)
    (partial / "model.safetensors").unlink()
    config = LlamaConfig.from_pretrained(partial)
    heads = sizes["num_attention_heads"]
    config.update({"tie_word_embeddings": True, "max_position_embeddings": 2048, **sizes})
    config.update({"head_dim": sizes["hidden_size"] // heads, "dtype": dtype})
    config.save_pretrained(partial)
    _write_weights(partial, shapes(config), dtype, device)
    partial.rename(folder)
    return str(folder)


def shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a Llama's weights, without those that are tied to others."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}


def _write_weights(
    folder: Path, named: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: str
) -> None:
    from safetensors.torch import save_file

    size = sum(torch.Size(shape).numel() for shape in named.values()) * dtype.itemsize
    if (free := shutil.disk_usage(folder).free) < 1.1 * size:
        raise OSError(
            f"{folder} has {free / 1e9:.1f} GB of free space, and the model needs "
            f"{size / 1e9:.1f} GB; set TMPDIR to a larger disk"
        )
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in named.items():
        before, layer, after = name.partition(".layers.")
        group = f"layer-{after.partition('.')[0]}" if layer else before.replace(".", "-")
        files.setdefault(f"model-{group}.safetensors", {})[name] = shape
    generator = torch.Generator(device).manual_seed(0)
    for file, group in files.items():
        tensors = {
            name: torch.ones(shape, dtype=dtype)
            if len(shape) == 1
            else _drawn(shape, dtype, generator)
            for name, shape in group.items()
        }
        save_file(tensors, folder / file, {"format": "pt"})
    index = {
        "metadata": {"total_size": size},
        "weight_map": {name: file for file, group in files.items() for name in group},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _drawn(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    drawn = torch.randn(shape, dtype=dtype, device=generator.device, generator=generator)
    return drawn.mul_(_SPREAD).cpu()


def scratch(needed: float = 40e9) -> str | None:
    """Return a folder in memory for models if it has ``needed`` bytes; None for the usual one."""
    memory = Path("/dev/shm")
    enough = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > needed
    return str(memory) if enough else None
