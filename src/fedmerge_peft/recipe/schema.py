"""The recipe, and its sections that are not defined in separate modules.

The docstrings of sections and fields are the descriptions of ``fedmerge schema`` and of error
messages, so they address users who edit a recipe. This module does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from fedmerge_peft.errors import RecipeError
from fedmerge_peft.recipe import (  # register parts  # noqa: F401
    label_tasks,
    media_tasks,
    personal_strategies,
    preference,
    text_tasks,
)
from fedmerge_peft.recipe.backbone import BackboneRecipe
from fedmerge_peft.recipe.callbacks import AnyCallback
from fedmerge_peft.recipe.clients import ClientsRecipe
from fedmerge_peft.recipe.data import DataRecipe
from fedmerge_peft.recipe.error_messages import found, refuse_values
from fedmerge_peft.recipe.evaluation import EvaluationRecipe, ServingRecipe
from fedmerge_peft.recipe.lora import LoraRecipe
from fedmerge_peft.recipe.metrics import compares
from fedmerge_peft.recipe.presets import with_preset
from fedmerge_peft.recipe.privacy import PrivacyRecipe
from fedmerge_peft.recipe.python_values import nested
from fedmerge_peft.recipe.robustness import RobustnessRecipe
from fedmerge_peft.recipe.section import (
    BatchSize,
    Boolean,
    Coefficient,
    Count,
    FileName,
    Fraction,
    Norm,
    Rate,
    Section,
)
from fedmerge_peft.recipe.stopping import StopRecipe
from fedmerge_peft.recipe.strategies import AnyStrategy, FedMergeRecipe
from fedmerge_peft.recipe.tasks import AnyTask

if TYPE_CHECKING:
    from fedmerge_peft.recipe.loading import Plugins


# ---- Training, evaluation, run -------------------------------------------------------------------
Logits = Literal["plain", "restricted", "adjusted"]


class TrainingRecipe(Section):
    """Local training of a client in a round."""

    device: str = "auto"
    """auto (a CUDA GPU if available, else the CPU), cpu, mps, cuda, or cuda:1."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Autocast in training. auto: on a CUDA GPU bf16, or fp16 if the GPU does not support bf16; no
    on other devices."""
    optimizer: Literal["adamw", "sgd", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = (
        "adamw"
    )
    """Local optimizer. Its state is new for each client and round. 8bit: AdamW with a state of 8
    bits instead of 32. paged: the state may move to the CPU's memory. These optimizers require the
    extra `quantization` (bitsandbytes), and paged ones a CUDA GPU. They have not been run on a GPU
    yet."""
    learning_rate: Rate | Literal["auto"] = "auto"
    """Step size of the local optimizer. auto: a range test before the first round trains a new
    adapter on up to four clients at each of several rates. It chooses the smallest rate whose
    validation loss is within one standard error of the lowest loss. If the training loss is lowest
    at a much higher rate, a rate between the two is chosen, because a single client overfits at
    lower rates than a federation. If no rate reduces the validation loss by more than its noise, or
    if there are no validation examples, the training loss decides. If no rate reduces that loss
    either, the default is used: 5e-3, or 0.1 for sgd. If training fails at the default, the rate
    with the lowest loss is used. With `privacy`, the default is used without a test, because the
    replies to a test would not be private. The baselines use the chosen rate."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Weight decay: decoupled for adamw, the gradient of an L2 penalty for sgd."""
    momentum: Fraction = 0.0
    """Momentum of sgd."""
    batch_size: BatchSize = 8
    """Examples per micro-batch. The default is small, because clients often have fewer than a
    hundred examples, and small batches give them enough optimizer steps."""
    gradient_accumulation: BatchSize = 1
    """Micro-batches per optimizer step. The loss of a step is the exact mean over its examples or
    labeled tokens, even if some micro-batches have fewer of these than others."""
    epochs: Count | Literal["auto"] = "auto"
    """Passes over a client's examples per round. auto: as many passes, at most 4, as a client of
    median size needs to take about 200 optimizer steps in the run, and at least 10 in each round.
    With `privacy`, auto is 4 passes, because the clients' sizes would not be private."""
    steps: Count | None = None
    """Optimizer steps per round, instead of epochs."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule of the learning rate within a round."""
    warmup: Fraction = 0.0
    """Fraction of a round's steps in which the learning rate rises from zero."""
    max_grad_norm: Norm | None = 1.0
    """Clip gradients to this L2 norm; null for no clipping."""
    proximal: Coefficient = 0.0
    """mu of the proximal term mu · ‖θ − θ_sent‖², as in FedMerge's code (FedProx has mu / 2)."""
    logits: Logits = "plain"
    """Logits in the training loss of a classifier. plain: the model's logits. restricted: only the
    logits of labels in the client's training examples, so that training does not lower the scores
    of other labels (after FedRS, KDD 2021). adjusted: as restricted, plus the logarithm of each
    label's frequency at the client, so that the model itself learns no label frequencies (balanced
    softmax, arXiv 2007.10740). Clients do not send their label counts for this. Evaluation uses
    the model's logits."""
    prefix_cache: Annotated[float, Field(ge=0, le=1e6)] = 2.0
    """GB of device memory for the inputs of the first layer with an adapter
    (`lora.layers_to_transform`), so that the frozen layers below it run once per example. If the
    memory does not suffice, or if the value is 0, these layers run in each pass. The results are
    the same up to rounding."""
    prefix_disk: Annotated[float, Field(ge=0, le=1e6)] = 10.0
    """GB of disk for the inputs that `prefix_cache` stores, in the cache folder (models.md), for
    later runs with the same model and examples; 0 to store none. Texts can be reconstructed from
    these files (privacy.md). The environment variable `FEDMERGE_PREFIX_DISK` takes precedence over
    this key. The results with and without the files are the same, bit for bit."""
    prefix_dtype: Literal["float16", "bfloat16"] | None = None
    """Number format in which `prefix_cache` and `prefix_disk` store the inputs. For a float32
    model, both formats need half of the space. The inputs are rounded to 11 (float16) or 8
    (bfloat16) significant bits, which changes results slightly. null: the model's format."""
    packing: Boolean = False
    """Let short examples of a batch share a row, instead of padding each to the longest one.
    Attention stays within an example, and the results are the same up to rounding, except for
    dropout masks. Before training, the model's logits are compared with those of padded batches; a
    model whose logits differ is refused."""
    clients_per_batch: Count | Literal["auto"] = "auto"
    """Number of clients that train in one forward pass, each with its own adapter and batch. Up to
    rounding, the results equal those of separate passes, except that dropout masks are drawn per
    pass. auto: 8 divided by `batch_size` and rounded down, or 256 divided by it on a CUDA GPU, and
    at most 16. If this number is below 3, or if the backbone is quantized, clients train one at a
    time. On a GPU, the number is reduced if the estimated memory exceeds 85 % of the free memory.
    With unsupported settings, such as DoRA, clients train one at a time; the log states the
    reason."""


Tracker = Literal[
    "tensorboard", "mlflow", "wandb", "trackio", "comet_ml", "aim", "clearml", "dvclive", "swanlab"
]


class Recipe(Section):
    """The settings of a run: task, backbone, adapter, data, strategy, training."""

    name: FileName
    """Name of the run. Its directory is runs/NAME unless --out is given."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the run. All random choices follow from it, the round and the client, except the
    noise of `privacy` across sites."""
    rounds: Count = 20
    """Number of rounds. More than 10 million optimizer steps of all clients together in a run cause
    a warning, and more than 10 billion are refused."""
    task: AnyTask
    """Task: the kind of examples, their columns, and the metrics."""
    backbone: BackboneRecipe
    """The frozen pretrained model."""
    lora: LoraRecipe = LoraRecipe()
    """The adapter that is trained and sent."""
    data: DataRecipe
    """Source of the examples, and their partition among clients."""
    strategy: AnyStrategy = FedMergeRecipe()
    """Federated method of the server."""
    baselines: list[AnyStrategy] = []
    """Strategies to run as well, with the same clients and seed. Each has a subdirectory of the run
    directory. A baseline with the name of `strategy` is skipped."""
    baselines_from: str | None = None
    """Directory of an earlier run. Results of the earlier run and of its baselines replace those
    `baselines` of this run that have the same strategy; the other baselines are run. The directory
    is refused if an earlier result is not finished, or if data, model, seed, rounds or any other
    setting that affects it differs. This run also uses the learning rate and the epochs that the
    earlier run chose automatically."""
    clients: ClientsRecipe = ClientsRecipe()
    """Participation of clients in a round."""
    robustness: RobustnessRecipe = RobustnessRecipe()
    """Robust aggregation, against malicious clients."""
    privacy: PrivacyRecipe = PrivacyRecipe()
    """Client-level differential privacy."""
    training: TrainingRecipe = TrainingRecipe()
    """Local training of a client in a round."""
    evaluation: EvaluationRecipe = EvaluationRecipe()
    """Evaluation during the run."""
    stop: StopRecipe = StopRecipe()
    """Early stopping."""
    serving: ServingRecipe = ServingRecipe()
    """Changes to the served adapters."""
    tracking: list[Tracker] = []
    """Experiment trackers that record each round, such as [tensorboard]. Their packages must be
    installed. tensorboard, aim and wandb write files to the folder `tracking` of the run
    directory."""
    callbacks: list[AnyCallback] = []
    """Callbacks of the run, such as [my_callback] or [{name: my_callback, every: 5}]. Only plugins
    register callbacks."""
    plugins: list[str] = []
    """Python modules to import before the recipe is validated, such as [my_plugin]. They register
    strategies, tasks, partition schemes, metrics, aggregation rules or callbacks. Each module must
    be installed, or be in a folder on PYTHONPATH."""

    def __init__(self, values: Any = None, /, **keys: Any) -> None:
        """Create a recipe from a dictionary, keywords or both; both may have dotted keys.

        Examples are ``Recipe(values, rounds=3)`` and ``Recipe(values, **{"stop.patience": 2})``.
        Raises ``RecipeError`` with all faults.
        """
        if values is None:
            values = {}
        if not isinstance(values, Mapping):
            hint = "; Recipe.load reads files and shipped recipes" * isinstance(values, str)
            raise RecipeError(f"Recipe: found {found(values)}, expected a dictionary{hint}")
        if repeated := sorted(values.keys() & keys):
            where = "in the dictionary and as a keyword; remove one of them"
            raise RecipeError(*(f"Recipe: {key}: is given twice, {where}" for key in repeated))
        super().__init__(**nested({**values, **keys}, "Recipe"))

    # Recipes from files bypass this constructor, so that errors have line numbers.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        return with_preset(values)

    @model_validator(mode="after")
    def _distinct_baselines(self) -> Recipe:
        if any(baseline.chosen_preset for baseline in self.baselines):
            raise ValueError(
                "baselines: a preset also sets rounds and training, which baselines share with "
                "the strategy; remove preset from the baseline, or make the baseline the strategy"
            )
        names = [baseline.name for baseline in self.baselines]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"baselines: found more than once: {', '.join(repeated)}; list each strategy once"
            )
        return self

    @model_validator(mode="after")
    def _best_round_of_all_clients(self) -> Recipe:
        if self.evaluation.serve == "best" and self.clients.fraction < 1:
            raise ValueError(
                "evaluation: serve: best compares the validation losses of all clients in each "
                f"round, but clients.fraction is {self.clients.fraction:g}; use serve: last, or "
                "fraction 1"
            )
        if self.evaluation.serve == "best" and self.privacy.mode != "none":
            raise ValueError(
                "evaluation: serve: best chooses a round by scores without noise, which "
                f"privacy.mode: {self.privacy.mode} does not cover; use serve: last"
            )
        return self

    @model_validator(mode="after")
    def _stopped_by_comparable_scores(self) -> Recipe:
        metrics = ("loss", *self.task.metrics)
        if self.stop.metric not in metrics:
            raise ValueError(
                f"stop: metric: {self.stop.metric} is not evaluated; use one of "
                f"{', '.join(metrics)}, or add it to task.metrics"
            )
        if self.stop.patience is not None and self.clients.fraction < 1:
            raise ValueError(
                "stop: patience compares the validation scores of all clients in each round, but "
                f"clients.fraction is {self.clients.fraction:g}; remove stop, or use fraction 1"
            )
        if self.stop.patience is not None and self.privacy.mode != "none":
            raise ValueError(
                "stop: patience ends a run by scores without noise, which "
                f"privacy.mode: {self.privacy.mode} does not cover; remove stop"
            )
        return self

    @model_validator(mode="after")
    def _reused_baselines_are_not_private(self) -> Recipe:
        if self.baselines_from is not None and self.privacy.mode != "none":
            raise ValueError(
                f"baselines_from: with privacy.mode: {self.privacy.mode}, the epsilon of a run "
                "includes its baselines, but reused baselines are part of another run's epsilon; "
                "remove baselines_from"
            )
        if self.baselines_from is not None and not self.baselines:
            raise ValueError(
                "baselines_from: there are no baselines to reuse; name them, such as "
                "baselines: [local, fedavg]"
            )
        return self

    @model_validator(mode="after")
    def _sections_suit_each_other(self) -> Recipe:
        if (reason := self.backbone.device_refusal(self.training.device)) is not None:
            raise ValueError(reason)
        for strategy in (self.strategy, *self.baselines):
            reason = self.privacy.refusal(strategy) or self.robustness.refusal(strategy)
            reason = reason or strategy.quantization_refusal(self.backbone.quantization)
            if reason is not None and strategy is not self.strategy:
                reason = f"baselines: {strategy.name}: {reason.removeprefix('strategy.')}"
            if reason is not None:
                raise ValueError(reason)
        if self.privacy.mode == "central" and self.robustness.defends:
            raise ValueError(
                "privacy.mode: central needs the mean of updates that are clipped to privacy.clip, "
                "but the section robustness changes the clipping or the mean; remove robustness, "
                "or use privacy.mode: local"
            )
        return self

    @model_validator(mode="after")
    def _labels_may_be_counted(self) -> Recipe:
        keys = {
            f"training: logits: {self.training.logits}": self.training.logits != "plain",
            "serving: label_prior": self.serving.label_prior,
            f"strategy: {self.strategy.name}": self.strategy.needs_labels,
            **{f"baselines: {baseline.name}": baseline.needs_labels for baseline in self.baselines},
        }
        for key, needs_labels in keys.items():
            if needs_labels and self.task.label_column is None:
                raise ValueError(
                    f"{key} needs examples with one label each, which the task {self.task.name} "
                    "does not have; remove this setting"
                )
        if self.serving.label_prior and self.privacy.mode != "none":
            raise ValueError(
                "serving: label_prior needs the clients' label counts at the server, which "
                f"privacy.mode: {self.privacy.mode} does not protect; remove one of them"
            )
        return self

    @model_validator(mode="after")
    def _mixtures_generate_no_text(self) -> Recipe:
        generated = [name for name in self.task.metrics if compares([name], "texts")]
        mixing = [
            strategy for strategy in (self.strategy, *self.baselines) if not strategy.single_adapter
        ]
        if generated and mixing:
            raise ValueError(
                f"task: the metric {generated[0]} needs generated text, which the mixture of "
                f"adapters of {mixing[0].name} does not support; "
                f"use perplexity or accuracy, or another strategy instead of {mixing[0].name}"
            )
        return self

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Recipe:
        """Create a recipe from values by key, like ``Recipe(values)``. Raises ``RecipeError``."""
        obj = nested(obj, cls.__name__) if isinstance(obj, Mapping) else obj
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise refuse_values(cls, obj, error) from error

    @classmethod
    def load(
        cls,
        source: str | PathLike[str],
        overrides: Sequence[str] = (),
        *,
        plugins: Plugins = "import",
    ) -> Recipe:
        """Read a shipped recipe by name, or a YAML file by path, and apply overrides.

        Overrides (``key.sub=value``) take precedence over the file, and the file over the defaults.

        Args:
            source: Name or path.
            overrides: Texts such as ``rounds=3``, applied in this order.
            plugins: Treatment of the modules that the recipe lists under its key ``plugins``.
                ``"import"`` imports them, and ``"ignore"`` does not. A ``Consent`` imports them if
                it allows all of them, and otherwise causes an error.

        Raises:
            RecipeError: The recipe is invalid. The error lists all faults.
        """
        from fedmerge_peft.recipe.loading import load

        return load(cls, source, overrides, plugins)

    def replace(self, overrides: Iterable[str]) -> Recipe:
        """Return a copy with ``key.sub=value`` overrides applied. Raises ``RecipeError``."""
        from fedmerge_peft.recipe.loading import override

        return override(self, overrides)

    def to_yaml(self) -> str:
        """Return YAML with all defaults, from which ``Recipe.load`` reads an equal recipe."""
        from fedmerge_peft.recipe.loading import dump

        return dump(self)

    def _repr_html_(self) -> str:
        from fedmerge_peft.recipe.notebook import recipe_html

        return recipe_html(self)
