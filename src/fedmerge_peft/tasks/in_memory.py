"""Models that a Python program passes, with their tokenizer or image processor.

A recipe names such a model by its fingerprint, ``backbone.model: memory:DIGEST``. This module has
only weak references, so callers of ``take_model`` must keep the ``PassedModel``. Runs train on
copies and never change the objects.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor, nn

from fedmerge_peft.errors import BackboneError
from fedmerge_peft.recipe.error_messages import found
from fedmerge_peft.util.digest import digest

IN_MEMORY = "memory"
"""Prefix of ``backbone.model``, before a colon, for a model that a Python program passes."""
_VOLATILE = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
"""Entries of a configuration that do not change what a model computes."""
_SETTINGS = ("padding_side", "truncation_side", "model_max_length", "chat_template")
_STEPS = ("normalizer", "pre_tokenizer", "model", "post_processor")
"""Parts of a fast tokenizer that determine its tokens."""


@dataclass(eq=False)
class PassedModel:
    """A model and its tokenizer or image processor, as a Python program passed them last.

    A fingerprint does not cover everything that a forward pass depends on, such as the variables
    that a function has captured. Objects that are passed later therefore replace earlier objects
    with the same fingerprint.
    """

    model: nn.Module
    processor: Any
    name: str
    """``memory:`` and the fingerprint of the model and its processor."""

    def check_unchanged(self) -> None:
        """Raise ``BackboneError`` if the model or its processor has changed since it was passed."""
        if _name(self.model, self.processor) != self.name:
            raise BackboneError(
                f"model: the {type(self.model).__name__}, or its tokenizer or image processor, has "
                f"changed since it was passed ({self.name}); pass the unchanged objects again, or "
                "start a new run with the changed ones"
            )


_PASSED: WeakValueDictionary[str, PassedModel] = WeakValueDictionary()


def take_model(
    model: nn.Module | None, tokenizer: Any = None, processor: Any = None
) -> PassedModel | None:
    """Check and register a model with its processor; return None if no model is passed.

    Args:
        model: A model of transformers, or any module whose ``forward(**batch)`` returns an object
            with ``logits``, or the logits themselves.
        tokenizer: Tokenizer of a model for texts.
        processor: Image processor of transformers, or a function from a PIL image to an array or
            tensor ``(channels, height, width)``.

    Raises:
        BackboneError: The model is not a module, is compiled, contains a PEFT adapter or has no
            weights in memory; neither or both of tokenizer and processor are passed; one of these
            is passed without a model.
    """
    given = [part for part in (tokenizer, processor) if part is not None]
    if model is None:
        if given:
            name = "processor" if tokenizer is None else "tokenizer"
            raise BackboneError(
                f"{name}: found it without a model; pass the model, too (model=...), or remove "
                f"{name}=... if the recipe names the model"
            )
        return None
    if not isinstance(model, nn.Module):
        raise BackboneError(
            f"model: found {found(model)}, expected a loaded model of transformers or a "
            "torch.nn.Module; a hub id or a folder belongs in the recipe (backbone.model)"
        )
    if len(given) != 1:
        raise BackboneError(
            "model: pass its tokenizer=... (texts) or its processor=... (images), and not both"
        )
    if hasattr(model, "_orig_mod"):
        raise BackboneError(
            "model: torch.compile has wrapped it; pass the module that was compiled "
            "(model._orig_mod)"
        )
    if hasattr(model, "peft_config") or any(map(_is_adapted, model.modules())):
        raise BackboneError(
            "model: it holds a PEFT adapter; pass the base model alone, or merge the adapter into "
            "it first (merge_and_unload())"
        )
    name = _name(model, given[0])
    passed = _PASSED.setdefault(name, PassedModel(model, given[0], name))
    passed.model, passed.processor = model, given[0]
    return passed


def is_passed(name: str) -> bool:
    """Return True if ``backbone.model`` names a model that a Python program passes."""
    return name.partition(":")[0] == IN_MEMORY


def is_here(name: str) -> bool:
    """Return True if the model of this name is in memory."""
    return name in _PASSED


def passed_model(name: str) -> PassedModel | None:
    """Return the model that ``memory:DIGEST`` names; None for a folder or a hub id.

    Raises:
        BackboneError: The model is not, or no longer, in memory.
    """
    if not is_passed(name):
        return None
    passed = _PASSED.get(name)
    if passed is None:
        raise BackboneError(
            f"backbone.model: {name} is a model that a Python program must pass; start a run with "
            "federate(recipe, model=..., tokenizer=...), or open one with the same model: "
            "load_run(path, model=..., tokenizer=...) (for images, processor=... instead of "
            "tokenizer=...)"
        )
    return passed


def passed_processor(name: str) -> Any:
    """Return a copy of the processor of a model in memory; None for a folder or a hub id.

    A function is returned as ``ImageFunction``.
    Raises ``BackboneError`` if ``memory:DIGEST`` names a model that is not in memory.
    """
    passed = passed_model(name)
    if passed is None:
        return None
    if not hasattr(passed.processor, "save_pretrained") and callable(passed.processor):
        return ImageFunction(passed.processor)
    return deepcopy(passed.processor)


class ImageFunction:
    """Image processor that calls a function from a PIL image to ``(channels, height, width)``."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function

    def __call__(self, images: list[Any], return_tensors: str = "np") -> dict[str, list[Any]]:
        """Return ``pixel_values``: a list with one array per image."""
        outputs = map(self._function, images)
        return {
            "pixel_values": [
                output.detach().cpu().numpy() if isinstance(output, Tensor) else output
                for output in outputs
            ]
        }


# ---- fingerprint ---------------------------------------------------------------------------------


def _name(model: nn.Module, processor: Any) -> str:
    parts = digest(_parts(model, processor)).hex()
    return f"{IN_MEMORY}:{parts[:16]}"


def _parts(model: nn.Module, processor: Any) -> Iterator[Tensor | str]:
    """Yield structure, code, configuration, weights and processor of a model."""
    for name, module in model.named_modules():
        yield f"{name} {type(module).__name__} {' '.join(behavior(module))}"
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        entries = {key: value for key, value in config.to_dict().items() if key not in _VOLATILE}
        yield json.dumps(entries, sort_keys=True, default=str)
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        if tensor.is_meta:
            raise BackboneError(
                f"model: {name} has no values in memory (it is on the meta device); load the model "
                "without offloading"
            )
        yield name
        yield tensor
    yield _description(processor)


def behavior(module: nn.Module) -> list[str]:
    """Describe a module's computation apart from its weights, as texts.

    The texts are the settings of a layer of torch, the source of a forward pass that is neither
    torch's nor transformers', and the source of attached functions.
    """
    library = type(module).__module__.partition(".")[0]
    settings = [module.extra_repr()] if library == "torch" else []
    own = [] if library in ("torch", "transformers") else [type(module).forward]
    return settings + [_source(function) for function in (*own, *attached(module))]


def attached(module: nn.Module) -> list[Callable[..., Any]]:
    """Return the functions that a program has attached to one module: hooks and a new ``forward``.

    The list is empty if Accelerate has placed the module on a device (``_hf_hook``).
    """
    if hasattr(module, "_hf_hook"):
        return []
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return [*hooks, *([vars(module)["forward"]] if "forward" in vars(module) else [])]


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(module, "peft_config") or hasattr(module, "adapter_layer_names")


def _source(function: Callable[..., Any]) -> str:
    """Return the source of a function; if there is none, its name or the name of its type."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return str(getattr(function, "__qualname__", type(function).__qualname__))


def _description(processor: Any) -> str:
    """Describe a tokenizer by tokens and settings, and a processor by its settings or source."""
    if hasattr(processor, "get_vocab"):
        tokens = sorted(processor.get_vocab().items())
        settings = [str(getattr(processor, name, None)) for name in _SETTINGS]
        parts = [getattr(getattr(processor, "_tokenizer", None), name, None) for name in _STEPS]
        states = [part and part.__getstate__() for part in parts]
        return repr((tokens, sorted(map(str, processor.all_special_tokens)), settings, states))
    if hasattr(processor, "to_json_string"):
        return str(processor.to_json_string())
    return _source(processor)
