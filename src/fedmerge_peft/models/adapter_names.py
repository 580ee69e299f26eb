"""Checks of the section ``lora`` against the model.

Every name and pattern must match something in the model, and the LoRA factors must fit into memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from fedmerge_peft.data.columns import did_you_mean, join_values
from fedmerge_peft.errors import BackboneError
from fedmerge_peft.recipe.lora import LoraRecipe
from fedmerge_peft.util.memory import shortage

_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")
"""Pattern of a module's path up to the number of its layer, as in PEFT."""


def adaptable_modules(model: Any) -> list[str]:
    """Return the distinct last parts of the paths of linear layers, which LoRA can adapt."""
    kinds = ("Linear", "Conv1D", "Linear8bitLt", "Linear4bit")
    return _last_names(
        name for name, module in model.named_modules() if type(module).__name__ in kinds
    )


def check_names(model: Any, lora: LoraRecipe, defaults: Iterable[str], name: str) -> None:
    """Raise ``BackboneError`` if the model lacks a module, parameter, layer or token of ``lora``.

    Args:
        model: Transformers model, without an adapter.
        lora: The recipe's section ``lora``.
        defaults: PEFT's target modules for the architecture. They apply if ``lora`` names none.
        name: Name of the model, for error messages.
    """
    modules = [path for path, _ in model.named_modules() if path]
    parameters = [path for path, _ in model.named_parameters()]
    adaptable = adaptable_modules(model)
    trained = _last_names(path.rpartition(".")[0] for path in parameters)
    experts = list(dict.fromkeys(".".join(path.split(".")[-2:]) for path in parameters))
    _check(lora, "target_modules", modules, adaptable, f"{name} has no module")
    _check(lora, "exclude_modules", modules, adaptable, f"{name} has no module")
    _check(lora, "modules_to_save", modules, trained, f"{name} has no module")
    _check(lora, "target_parameters", parameters, experts, f"{name} has no parameter")
    if lora.layers_to_transform is not None and not isinstance(lora.target_modules, str):
        _check_layers(lora, modules, lora.target_modules or list(defaults), name)
    if lora.trainable_token_indices:
        _check_tokens(model, lora.trainable_token_indices, name)


def check_rank(model: Any, lora: LoraRecipe) -> None:
    """Raise ``BackboneError`` if the factors do not fit into memory, before they are allocated.

    The factors of a layer have r · (inputs + outputs) numbers. If the target modules are a list,
    and no other key excludes layers or changes their rank, the factors of all target modules are
    counted. Otherwise, the adapted layers and their ranks are not known here. Only the smallest
    layer is then counted, at the lowest rank, so that an adapter that fits is never refused.

    Args:
        model: Transformers model, without an adapter.
        lora: The recipe's section ``lora``.
    """
    targets = lora.target_modules
    widths = [
        sum(getattr(module, size, 0) for size in ("in_features", "out_features", "nx", "nf"))
        for path, module in model.named_modules()
        if not isinstance(targets, list) or any(_is_named(path, name) for name in targets)
    ]
    narrowed = lora.layers_to_transform is not None or lora.exclude_modules or lora.rank_pattern
    rank = lora.r
    if isinstance(targets, list) and not narrowed:
        numbers = rank * sum(widths)
    else:
        rank = min([rank, *lora.rank_pattern.values()])
        numbers = rank * min(filter(None, widths), default=0)
    if lack := shortage(numbers):
        patterns = " and lora.rank_pattern" * bool(lora.rank_pattern)
        raise BackboneError(f"lora.r: the factors of rank {rank} {lack}; lower lora.r{patterns}")


def check_matches(model: Any, lora: LoraRecipe) -> None:
    """Raise ``BackboneError`` if PEFT ignored a name, a pattern or a layer in ``lora``.

    Args:
        model: PEFT model.
        lora: The recipe's section ``lora``.
    """
    from peft.utils.other import get_pattern_key

    modules: list[str] = model.base_model.targeted_module_names
    adapted = [*modules, *model.base_model.targeted_parameter_names]
    there = join_values(_last_names(adapted))
    paths = [path for path, _ in model.base_model.model.named_modules()]
    for target in lora.target_modules if isinstance(lora.target_modules, list) else ():
        if any(_is_named(path, target) for path in modules):
            continue
        if not all(_is_excluded(path, lora) for path in paths if _is_named(path, target)):
            raise BackboneError(
                f"lora.target_modules: {target!r} adapts no module, because the modules of this "
                "name are trained in full, or outside the layers in lora.layers_to_transform "
                f"(modules with an adapter: {there}); remove it"
            )
    if lora.layers_to_transform not in (None, []):
        for path in modules:
            if (layer := _layer(path)) not in _listed(lora):
                remedy = "remove it" if layer is None else "name it by the last part of its path"
                raise BackboneError(
                    f"lora.layers_to_transform: PEFT adapts {path} outside the listed layers, "
                    f"because lora.target_modules names it by its whole path; {remedy}"
                )
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = list(getattr(lora, field))
        used = {get_pattern_key(patterns, path) for path in adapted}
        for pattern in patterns:
            if pattern not in used:
                raise BackboneError(
                    f"lora.{field}: {pattern!r} matches no module with an adapter, or only modules "
                    "that an earlier pattern matches"
                    f"{did_you_mean(pattern, _last_names(adapted))}; "
                    f"modules with an adapter: {there}"
                )


def _check(
    lora: LoraRecipe, field: str, paths: Sequence[str], there: Sequence[str], missing: str
) -> None:
    """Raise ``BackboneError`` unless each name or the pattern of a field matches a path."""
    written = getattr(lora, field)
    if isinstance(written, str):
        linear = field == "target_modules" and written.lower() == "all-linear"
        if linear or any(re.fullmatch(written, path) for path in paths):
            return
        hint = "remove it"
        if any(_is_named(path, written) for path in paths):
            hint = f"write [{written}] for all modules of this name"
        elif there:
            hint = rf"paths end in {join_values(there)}; write a pattern such as .*\.{there[0]}"
        raise BackboneError(
            f"lora.{field}: {missing} whose path matches {written!r}, a pattern for the whole "
            f"path; {hint}"
        )
    for name in written or ():
        if not any(_is_named(path, name) for path in paths):
            raise BackboneError(
                f"lora.{field}: {missing} {name!r}{did_you_mean(name, there)}; "
                f"{f'choose from {join_values(there)}' if there else 'remove it'}"
            )


def _check_layers(
    lora: LoraRecipe, modules: Sequence[str], targets: Sequence[str], name: str
) -> None:
    """Raise ``BackboneError`` unless each listed layer has a target module."""
    named = (path for path in modules if any(_is_named(path, target) for target in targets))
    layers = sorted({layer for layer in map(_layer, named) if layer is not None})
    wanted = f"from {join_values(layers)}" if layers else "other modules"
    for layer in _listed(lora):
        if layer not in layers:
            raise BackboneError(
                f"lora.layers_to_transform: {name} has no layer {layer} with "
                f"{join_values(targets)}; choose {wanted}"
            )


def _check_tokens(model: Any, tokens: Iterable[int], name: str) -> None:
    """Raise ``BackboneError`` unless the model has an embedding of each token."""
    try:
        count = getattr(model.get_input_embeddings(), "num_embeddings", 0)
    except NotImplementedError:  # an image model
        count = 0
    for token in tokens:
        if not 0 <= token < count:
            there = "it has no embeddings of tokens, so remove lora.trainable_token_indices"
            if count:
                there = f"choose from 0 to {count - 1}"
            raise BackboneError(
                f"lora.trainable_token_indices: {name} has no token {token}; {there}"
            )


def _listed(lora: LoraRecipe) -> list[int]:
    layers = lora.layers_to_transform
    return [layers] if isinstance(layers, int) else layers or []


def _layer(path: str) -> int | None:
    """Return the number of a module's layer; None for modules outside the layers."""
    match = _LAYER.match(path)
    return int(match[1]) if match else None


def _is_named(path: str, name: str) -> bool:
    """Return True if a path equals a name, or ends with it after a dot."""
    return path == name or path.endswith("." + name)


def _is_excluded(path: str, lora: LoraRecipe) -> bool:
    excluded = lora.exclude_modules or []
    if isinstance(excluded, str):
        return re.fullmatch(excluded, path) is not None
    return any(_is_named(path, name) for name in excluded)


def _last_names(paths: Iterable[str]) -> list[str]:
    """Return the distinct last parts of paths, in order of appearance, without numbers."""
    names = dict.fromkeys(path.rpartition(".")[2] for path in paths)
    return [name for name in names if name and not name.isdecimal()]
