"""Strategies: the server-side methods, such as FedMerge and FedAvg, and their construction."""

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from fedmerge_peft.adapters.soup import AdapterSoup
from fedmerge_peft.errors import PluginError, RecipeError
from fedmerge_peft.plugins import STRATEGIES
from fedmerge_peft.recipe.strategy_base import StrategyRecipe
from fedmerge_peft.strategies.base import Reply, Strategy, StrategyContext, stack_replies
from fedmerge_peft.strategies.partly_shared import PrivateHeads
from fedmerge_peft.strategies.server_step import fedmerge_step
from fedmerge_peft.strategies.wrapping import WrappedStrategy
from fedmerge_peft.util.memory import shortage
from fedmerge_peft.util.vectors import tensor_mismatch

__all__ = [
    "Reply",
    "Strategy",
    "StrategyContext",
    "fedmerge_step",
    "make_strategy",
    "stack_replies",
    "update_strategy",
]


def make_strategy(recipe: StrategyRecipe, context: StrategyContext) -> Strategy:
    """Return a new strategy for a recipe.

    Raises:
        RecipeError: The strategy does not support the adapter's settings or the robust aggregation,
            or the adapters that it keeps do not fit into memory.
        PluginError: A plugin's strategy cannot be constructed, is not a ``Strategy``, has no soup,
            has weights of the wrong shape, or names state that is missing or cannot be saved.
        RunError: The disk has no space for the soup.
    """
    _check_memory(recipe, context)
    if recipe.private_head:
        return PrivateHeads(recipe.name, partial(_make_strategy, recipe), context)
    return _make_strategy(recipe, context)


def _make_strategy(recipe: StrategyRecipe, context: StrategyContext) -> Strategy:
    """Return a new strategy without the wrapper for private heads; see ``make_strategy``."""
    entry = STRATEGIES[recipe.name]
    with entry.named_in_errors("strategy"):
        strategy: Strategy = entry.load()(recipe, context)
    strategy.aggregator = context.aggregator
    if context.aggregator.recipe.defends and recipe.federated and not strategy.averages:
        raise RecipeError(
            f"robustness: {recipe.name} does not compute its adapters as means of updates, so "
            "robust rules and clipping do not apply; use another strategy, or remove the section"
        )
    if fault := _interface_fault(strategy, context):
        raise PluginError(f"the strategy {recipe.name!r} of {entry.module}: {fault}")
    return strategy


def _check_memory(recipe: StrategyRecipe, context: StrategyContext) -> None:
    """Raise ``RecipeError`` before allocation if the strategy's adapters need too much memory."""
    key, size = recipe.adapters_key, context.layout.size
    count = getattr(recipe, key, None)
    numbers = count * size if isinstance(count, int) else 0
    if lack := shortage(int(recipe.floats_in_memory * numbers)):
        raise RecipeError(
            f"strategy.{key}: the server's adapters ({count} of {size:,} numbers each) {lack}; "
            "lower this key or lora.r"
        )
    each = getattr(STRATEGIES[recipe.name].load(), "adapters_per_client", 0)
    if lack := shortage(each * context.clients * size):
        kept = "an adapter" if each == 1 else f"{each} adapters"
        raise RecipeError(
            f"strategy.name: {recipe.name} keeps {kept} of {size:,} numbers for each client "
            f"({context.clients:,} in all), which {lack}; lower lora.r, use fewer clients, or use "
            "another strategy"
        )


def update_strategy(name: str, strategy: Strategy, replies: Sequence[Reply]) -> None:
    """Update the strategy with this name from a round's replies.

    The number of adapters may change if the strategy overrides ``resize``.

    Raises:
        PluginError: A plugin's strategy fails, or its soup or weights have the wrong type or shape
            or are not finite afterwards.
    """
    entry = STRATEGIES[name]
    if entry.origin == "built-in":
        strategy.update(replies)
        return
    clients, (adapters, size) = len(strategy.weights), strategy.soup.rows.shape
    with entry.named_in_errors("strategy"):
        strategy.update(replies)
        if type(_innermost(strategy)).resize is not Strategy.resize:
            adapters = len(strategy.soup)
    for part, value, shape in (
        ("soup.rows", strategy.soup.rows, (adapters, size)),
        ("weights", strategy.weights, (clients, adapters)),
    ):
        if mismatch := tensor_mismatch(value, shape):
            raise PluginError(
                f"the strategy {name!r} of {entry.module}: after update, {part} is {mismatch}"
            )


def _innermost(strategy: Strategy) -> Strategy:
    """Return the strategy without its wrappers."""
    while isinstance(strategy, WrappedStrategy):
        strategy = strategy.inner
    return strategy


def _interface_fault(strategy: object, context: StrategyContext) -> str | None:
    """Return the reason why a new strategy cannot run or resume; None if it can do both."""
    if not isinstance(strategy, Strategy):
        return f"{type(strategy).__name__} is not a subclass of Strategy; derive it from that class"
    if not isinstance(getattr(strategy, "soup", None), AdapterSoup):
        return "it has no AdapterSoup; set self.soup in __init__"
    shape, expected = tuple(strategy.weights.shape), (context.clients, len(strategy.soup))
    if shape != expected:
        return f"its weights have shape {shape}, expected (clients, adapters) = {expected}"
    if missing := [name for name in strategy.state_fields if not hasattr(strategy, name)]:
        return (
            f"state_fields names attributes that the strategy lacks: {', '.join(missing)}; "
            "set them in __init__"
        )
    for name, value in strategy.state_dict().items():
        if not (value is None or isinstance(value, Tensor) or type(value) is int):
            return (
                f"state_fields names {name}, a {type(value).__name__}, which cannot be saved; "
                "use a tensor, an int, or a Stateful object"
            )
    return None
