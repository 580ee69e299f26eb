"""The section ``backbone``: the frozen pretrained model."""

from __future__ import annotations

from typing import Literal

from fedmerge_peft.recipe.section import Boolean, Section, Source


class BackboneRecipe(Section):
    """The frozen pretrained model, the same for all clients."""

    model: Source
    """Hugging Face model id, or a local folder with the same files."""
    revision: Source | None = None
    """Branch, tag or commit on the hub."""
    gguf_file: Source | None = None
    """GGUF file in the folder `model`, such as `model.Q4_K_M.gguf`. Its weights are dequantized to
    `dtype` once, and the result is kept in the cache folder. Requires the extra `gguf`."""
    tokenizer: Source | None = None
    """Id or folder of the tokenizer, or of the processor of images or audio. Default: the id or
    folder of the model."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the frozen weights. Adapters are always float32."""
    attention: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    """Attention implementation. Default: chosen by transformers."""
    quantization: Literal["8bit", "4bit"] | None = None
    """Quantize the frozen weights to 8 bits, or to 4 bits as in QLoRA (NF4, computed in bfloat16).
    Requires the extra `quantization` (bitsandbytes), and a CUDA GPU or a CPU. On a CPU,
    quantization saves memory and costs time. With 8 bits, clients train one at a time."""
    double_quantization: Boolean = True
    """With `quantization: 4bit`, quantize the scales of the weights as well, which saves about
    0.4 bits per weight."""
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = None
    """Distribute the layers over all GPUs of one process, as `device_map` of transformers does. A
    pass runs on one GPU after another, so this saves memory, not time. Without a GPU, it has no
    effect."""
    gradient_checkpointing: Boolean = False
    """Recompute activations in the backward pass: less memory, but about a third more time."""
    trust_remote_code: Boolean = False
    """Run Python code that comes with the model. Enable it only for code that you have read."""

    def device_refusal(self, device: str) -> str | None:
        """Return the reason why ``device_map`` rules out a ``training.device``, or None."""
        if self.device_map is None or device in ("auto", "cpu", "cuda"):
            return None
        return (
            "backbone.device_map: distributes the model over all GPUs, but training.device is "
            f"{device}; use training.device: cuda, or remove backbone.device_map"
        )
