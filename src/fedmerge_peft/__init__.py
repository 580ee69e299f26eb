"""Federated LoRA fine-tuning of Hugging Face models with a personal adapter for every client.

from fedmerge_peft import Recipe, federate
run = federate(Recipe.load("quickstart"))
run.weights
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmerge_peft.adapters import (
        AdapterLayout,
        AdapterSoup,
        MergingWeights,
        concat,
        merge_error,
    )
    from fedmerge_peft.analysis import Comparison, compare, local_global_gap
    from fedmerge_peft.api import Run, federate, load_run, resume, sweep
    from fedmerge_peft.data.partition import ClientRows
    from fedmerge_peft.data.schemes import Splits
    from fedmerge_peft.errors import (
        BackboneError,
        ClientError,
        DataError,
        DeviceError,
        DivergedError,
        FedMergeError,
        PluginError,
        RankError,
        RecipeError,
        ResumeError,
        RunBusyError,
        RunError,
        RunExistsError,
        SweepError,
        TooFewClientsError,
    )
    from fedmerge_peft.federation.callbacks import Callback
    from fedmerge_peft.federation.loop import Federation
    from fedmerge_peft.recipe import Recipe
    from fedmerge_peft.recipe.callbacks import CallbackRecipe
    from fedmerge_peft.recipe.data import PartitionRecipe
    from fedmerge_peft.recipe.grid import expand
    from fedmerge_peft.recipe.registration import (
        register_aggregation,
        register_callback,
        register_metric,
        register_partition,
        register_strategy,
        register_task,
    )
    from fedmerge_peft.recipe.strategy_base import StrategyRecipe
    from fedmerge_peft.recipe.tasks import TaskRecipe
    from fedmerge_peft.report.page import write_report
    from fedmerge_peft.runs.record import RoundRecord, Scores
    from fedmerge_peft.serving.export import export_all, export_client, export_soup, push_to_hub
    from fedmerge_peft.serving.merged_adapter import MergedAdapter
    from fedmerge_peft.serving.personalize import personalize
    from fedmerge_peft.serving.personalized import Personalized
    from fedmerge_peft.serving.predictor import Predictor
    from fedmerge_peft.strategies import Reply, Strategy, StrategyContext, fedmerge_step
    from fedmerge_peft.tasks import Task

# PEFT imports bitsandbytes, which may then log advice to install a kernel that no run needs.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

__version__ = "0.2.0"

__all__ = [
    "AdapterLayout",
    "AdapterSoup",
    "BackboneError",
    "Callback",
    "CallbackRecipe",
    "ClientError",
    "Comparison",
    "DataError",
    "DeviceError",
    "FedMergeError",
    "Federation",
    "ClientRows",
    "MergedAdapter",
    "MergingWeights",
    "PartitionRecipe",
    "Personalized",
    "PluginError",
    "Predictor",
    "RankError",
    "Recipe",
    "RecipeError",
    "Reply",
    "ResumeError",
    "RoundRecord",
    "Run",
    "RunBusyError",
    "RunError",
    "RunExistsError",
    "Scores",
    "Splits",
    "Strategy",
    "StrategyContext",
    "StrategyRecipe",
    "SweepError",
    "Task",
    "TaskRecipe",
    "DivergedError",
    "TooFewClientsError",
    "compare",
    "concat",
    "expand",
    "export_all",
    "export_client",
    "export_soup",
    "federate",
    "fedmerge_step",
    "load_run",
    "local_global_gap",
    "merge_error",
    "personalize",
    "push_to_hub",
    "register_aggregation",
    "register_callback",
    "register_metric",
    "register_partition",
    "register_strategy",
    "register_task",
    "resume",
    "sweep",
    "write_report",
]

_HOMES = {
    "adapters": ("AdapterLayout", "AdapterSoup", "MergingWeights", "concat", "merge_error"),
    "errors": (
        "BackboneError",
        "ClientError",
        "DataError",
        "DeviceError",
        "FedMergeError",
        "PluginError",
        "RankError",
        "RecipeError",
        "ResumeError",
        "RunBusyError",
        "RunError",
        "RunExistsError",
        "SweepError",
        "DivergedError",
        "TooFewClientsError",
    ),
    "analysis": ("Comparison", "compare", "local_global_gap"),
    "serving.export": ("export_all", "export_client", "export_soup", "push_to_hub"),
    "federation.callbacks": ("Callback",),
    "federation.loop": ("Federation",),
    "serving.merged_adapter": ("MergedAdapter",),
    "serving.personalize": ("personalize",),
    "serving.personalized": ("Personalized",),
    "serving.predictor": ("Predictor",),
    "recipe": ("Recipe",),
    "runs.record": ("RoundRecord", "Scores"),
    "api": ("Run", "federate", "load_run", "resume", "sweep"),
    "data.partition": ("ClientRows",),
    "data.schemes": ("Splits",),
    "strategies": ("Reply", "Strategy", "StrategyContext", "fedmerge_step"),
    "tasks": ("Task",),
    "recipe.callbacks": ("CallbackRecipe",),
    "recipe.data": ("PartitionRecipe",),
    "recipe.grid": ("expand",),
    "recipe.registration": (
        "register_aggregation",
        "register_callback",
        "register_metric",
        "register_partition",
        "register_strategy",
        "register_task",
    ),
    "recipe.strategy_base": ("StrategyRecipe",),
    "recipe.tasks": ("TaskRecipe",),
    "report.page": ("write_report",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import public names on first use: ``import fedmerge_peft`` alone does not load torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    dunder = [name for name in globals() if name.startswith("__")]
    return sorted([*dunder, *__all__])
