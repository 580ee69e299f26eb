"""GGUF files as backbones: dequantized once, into a folder that transformers loads."""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError

from fedmerge_peft.errors import BackboneError
from fedmerge_peft.models.quiet import quiet_transformers
from fedmerge_peft.recipe.backbone import BackboneRecipe
from fedmerge_peft.util.extras import install_command
from fedmerge_peft.util.library_errors import library_errors, reason_of
from fedmerge_peft.util.private_folder import is_own, make_private
from fedmerge_peft.util.tensor_cache import cache_folder

log = logging.getLogger(__name__)


def dequantized_folder(backbone: BackboneRecipe, folder: Path, gguf_file: str) -> Path:
    """Return a folder with the weights of a GGUF file, as safetensors, and with its tokenizer.

    The folder is written once for each file and number format. A file is considered new if its
    path, size or modification time differs.

    Args:
        backbone: Number format of the weights.
        folder: Folder of the file.
        gguf_file: Name of the file.

    Raises:
        BackboneError: The file does not exist or cannot be loaded, the folder cannot be written or
            trusted, or gguf is not installed.
    """
    path = _existing(folder, gguf_file)
    facts = path.stat()
    key = f"{path.resolve()} {facts.st_size} {facts.st_mtime_ns} {backbone.dtype}"
    try:
        cache = cache_folder()
    except RuntimeError as error:
        raise BackboneError(
            f"backbone.gguf_file: the dequantized weights of {path.name} have no folder, because "
            "the user has no home directory; set FEDMERGE_CACHE to a folder"
        ) from error
    target = cache / "gguf" / sha256(os.fsencode(key)).hexdigest()[:32]
    if not _is_written(target):
        log.info(
            "%s is dequantized to %s, and kept in %s; training and predictions use these weights",
            path.name,
            backbone.dtype,
            target,
        )
        try:
            make_private(target.parent)
            with TemporaryDirectory(prefix=".partial-", dir=target.parent) as partial:
                _dequantize(backbone, path, Path(partial) / "model")
                try:
                    (Path(partial) / "model").rename(target)
                except OSError:
                    if not target.is_dir():  # otherwise, another process was faster
                        raise
        except OSError as error:
            raise BackboneError(
                f"backbone.model: {path.name} cannot be dequantized into {target.parent} "
                f"({error.strerror or error}); set FEDMERGE_CACHE to another folder"
            ) from error
    return target


def gguf_config(folder: Path, gguf_file: str) -> Any:
    """Load the configuration of a GGUF file's model from its metadata; no tensor is read.

    Args:
        folder: Folder of the file.
        gguf_file: Name of the file.

    Raises:
        BackboneError: The file does not exist or cannot be read, or gguf is not installed.
    """
    from transformers import AutoConfig

    path = _existing(folder, gguf_file)
    with quiet_transformers(), _gguf_errors(path):
        return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)


def _existing(folder: Path, gguf_file: str) -> Path:
    """Return the path of a GGUF file.

    Raises ``BackboneError`` if there is no such file, or gguf is not installed.
    """
    path = folder / gguf_file
    if not path.is_file():
        names = ", ".join(sorted(file.name for file in folder.glob("*.gguf"))[:5]) or "none"
        raise BackboneError(
            f"backbone.gguf_file: there is no file {path.absolute()} (GGUF files there: {names}); "
            "correct backbone.gguf_file, or the folder in backbone.model"
        )
    if find_spec("gguf") is None:
        raise BackboneError(
            f"backbone.model: {path.name} is a GGUF file, which needs gguf: "
            + install_command("gguf")
        )
    return path


def _gguf_errors(path: Path) -> AbstractContextManager[None]:
    """Convert errors inside the context to ``BackboneError``."""
    return library_errors(
        lambda reason: BackboneError(
            f"backbone.model: {path} cannot be loaded as a GGUF file: {reason}"
        )
    )


def _is_written(target: Path) -> bool:
    """Return True if the folder exists and has a model; make its parent folder private.

    Raises ``BackboneError`` if the folder or its parent is a link or belongs to another user.
    """
    try:
        if not is_own(target):
            raise PermissionError(None, "it is a link, or belongs to another user")
        make_private(target.parent)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise BackboneError(
            f"backbone.model: the dequantized weights in {target} are not used "
            f"({error.strerror or error}); set FEDMERGE_CACHE to another folder"
        ) from error
    return (target / "config.json").is_file()


def _dequantize(backbone: BackboneRecipe, path: Path, target: Path) -> None:
    """Write the causal language model of a GGUF file, and its tokenizer, to ``target``.

    Raises:
        BackboneError: The file cannot be loaded, or lacks tensors.
        OSError: ``target`` cannot be written.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"gguf_file": path.name}
    with quiet_transformers(), _gguf_errors(path), torch.random.fork_rng(devices=[]):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **source)
        loaded, report = AutoModelForCausalLM.from_pretrained(
            path.parent,
            dtype=getattr(torch, backbone.dtype),
            output_loading_info=True,
            **source,
        )
        if missing := sorted(report["missing_keys"]):
            raise BackboneError(
                f"backbone.model: {path.name} lacks {len(missing)} of the tensors of "
                f"{type(loaded).__name__}, such as {missing[0]}; use a complete GGUF file"
            )
        # The loaded model is marked as quantized. A new model with the same weights is not marked.
        config = loaded.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = type(loaded)._from_config(config, dtype=loaded.dtype)
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
    # Each rank writes its own folder, but transformers would save only on rank 0.
    model.should_save_on_this_rank = lambda _: True
    try:
        with quiet_transformers():
            model.save_pretrained(target)
            tokenizer.save_pretrained(target)
    except OSError:
        raise
    except SafetensorError as error:  # safetensors does not raise OSError if the disk is full
        raise OSError(None, reason_of(error)) from error
    except Exception as error:
        raise BackboneError(
            f"backbone.model: {path.name} cannot be saved after it was dequantized: "
            f"{reason_of(error)}"
        ) from error
