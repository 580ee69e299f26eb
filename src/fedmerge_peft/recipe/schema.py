"""What a run is asked to be: one pydantic model a noun, one docstring a field.

The docstrings feed ``fedmerge schema`` (the JSON schema that editors read) and the error texts, so
they are written for the person who edits a recipe. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from fedmerge_peft.recipe.callbacks import AnyCallback
from fedmerge_peft.recipe.data import DataRecipe
from fedmerge_peft.recipe.privacy import PrivacyRecipe
from fedmerge_peft.recipe.robustness import RobustnessRecipe
from fedmerge_peft.recipe.section import Boolean, Fraction, Section
from fedmerge_peft.recipe.strategies import AnyStrategy, FedMergeRecipe
from fedmerge_peft.recipe.tasks import AnyTask, compares_texts


# --------------------------------------------------------------------------------------------------
# Backbone and adapters
# --------------------------------------------------------------------------------------------------
class BackboneRecipe(Section):
    """The pretrained model that every client shares and nobody changes."""

    model: str
    """Hugging Face model id, or a local folder of the same form."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    tokenizer: str | None = None
    """Where the tokenizer or image processor is, when not beside the model."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the frozen weights. The adapters are float32 always."""
    attention: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    """Attention implementation. Default: what transformers picks."""
    quantization: Literal["8bit", "4bit"] | None = None
    """Hold the frozen weights in 8 or 4 bits; needs a CUDA GPU and the extra `quantization` (bitsandbytes)."""
    gradient_checkpointing: Boolean = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trust_remote_code: Boolean = False
    """Run Python code that comes with the model. Leave it off unless you have read that code."""


class LoraRecipe(Section):
    """The adapter: fields of PEFT's LoraConfig, and how adapters are merged."""

    r: PositiveInt = 8
    """Rank."""
    alpha: PositiveFloat = 16.0
    """Scaling numerator (lora_alpha): the update is alpha / r · B A."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input, in training."""
    target_modules: list[str] | str | None = None
    """Module names, one regular expression, or all-linear. Default: PEFT's choice for the architecture, where it has one."""
    exclude_modules: list[str] | str | None = None
    """Module names, or one regular expression, to leave out."""
    modules_to_save: list[str] | None = None
    """Modules trained whole and kept in the adapter. The classification head is added for classification tasks."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Bias terms that train too."""
    use_rslora: Boolean = False
    """Scale by alpha / sqrt(r) instead of alpha / r."""
    use_dora: Boolean = False
    """Weight-decomposed LoRA. Merging averages its magnitudes too, which is not exact in any merge mode."""
    init_lora_weights: bool | str = True
    """Start of the factors: true (A random, B zero) or gaussian. Starts that alter the backbone are refused."""
    rank_pattern: dict[str, PositiveInt] = {}
    """Rank by module name or regular expression, where it differs from r."""
    alpha_pattern: dict[str, PositiveFloat] = {}
    """Alpha by module name or regular expression, where it differs."""
    layers_to_transform: list[int] | int | None = None
    """Layer indices that get an adapter. Default: all."""
    trainable_token_indices: list[int] | None = None
    """Token ids whose embeddings train too."""
    target_parameters: list[str] | None = None
    """Names of parameters (not modules) to adapt, for mixture-of-experts layers."""
    merge: Literal["factor", "shared_a"] = "factor"
    """factor: average A and B each, as the paper averages parameters. shared_a: one random A, common and frozen; only B (and the
    head) trains and travels, and the average is exact."""

    @model_validator(mode="after")
    def _mergeable(self) -> LoraRecipe:
        if self.init_lora_weights not in (True, "gaussian"):
            raise ValueError(
                f"init_lora_weights: {self.init_lora_weights!r} cannot be merged on a shared backbone: it leaves B non-zero or "
                "changes the pretrained weights (pissa, olora, corda, loftq, eva ... do). Use true or gaussian"
            )
        if self.merge == "shared_a" and self.use_dora:
            raise ValueError(
                "merge: shared_a promises an exact merge, which use_dora cannot give; choose one of them"
            )
        return self


# --------------------------------------------------------------------------------------------------
# Training, evaluation, run
# --------------------------------------------------------------------------------------------------
class TrainingRecipe(Section):
    """What one client does in one round."""

    device: str = "auto"
    """auto (a CUDA GPU where there is one, else the CPU), cpu, mps, cuda, or cuda:1."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Autocast of forward and backward. auto: bf16 (else fp16) on a CUDA GPU, no elsewhere."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """A new optimizer for each client and round: only the adapter travels."""
    learning_rate: PositiveFloat = 1e-3
    """Step size of the local optimizer."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled for adamw, an L2 gradient for sgd."""
    momentum: Fraction = 0.0
    """Momentum of sgd."""
    batch_size: PositiveInt = 16
    """Examples a micro-batch."""
    gradient_accumulation: PositiveInt = 1
    """Micro-batches an optimizer step; their mean is exact, also where label counts differ."""
    epochs: PositiveInt = 1
    """Passes over the client's examples in a round."""
    steps: PositiveInt | None = None
    """Optimizer steps in a round, instead of epochs."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate within a round."""
    warmup: Fraction = 0.0
    """Part of a round's steps over which the learning rate rises from zero."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Clip each client's gradient to this norm; null for no clipping."""
    proximal: NonNegativeFloat = 0.0
    """mu of the proximal term mu · ‖θ − θ_sent‖², as in FedMerge's program (FedProx writes mu / 2)."""
    prefix_cache: NonNegativeFloat = 2.0
    """GB of memory, on the device, for what enters the first layer that has an adapter (`lora.layers_to_transform`): the frozen layers
    before it then run once for each example. Where this is too little, or 0, they run each time, with the same results."""
    clients_per_batch: PositiveInt | Literal["auto"] = "auto"
    """How many clients train in one pass of the model, each its own adapter on its own batch. Results agree to rounding, except that
    dropout masks are drawn for those who share a pass. auto: 3 to 16, as many as bring a pass to 8 examples on a CPU and to 256 on a GPU,
    or 1 where that is fewer. What does not allow it, DoRA for one, trains one client at a time; the log says why."""


class ClientsRecipe(Section):
    """Who takes part in a round, and what becomes of those who fail."""

    fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Part of the clients drawn at random each round; at least one."""
    failures: Literal["raise", "skip"] = "raise"
    """raise: a client that fails ends the run, which can be resumed. skip: it is named in the log and in the round's record, and the round
    goes on as if it had not been asked. A client fails where its work raises, where what it returns is not finite, or not of the shape,
    dtype and layout that were asked for, where it answers for another round or more than once, and where it takes too long."""
    min_clients: PositiveInt = 1
    """With `failures: skip`, how many clients must reply well. A round with fewer changes nothing and ends the run, which can be
    resumed."""
    timeout: PositiveFloat | None = None
    """Seconds that a client may take for a round, scoring included; null for no limit. Clients that train in this process are not
    interrupted: their time is looked at when they are done, and of a pass that several share each counts its part. Time is no part of the
    seed: a run whose clients come near this limit does not repeat."""


class EvaluationRecipe(Section):
    """What is measured in a round."""

    batch_size: PositiveInt = 64
    """Examples a batch in evaluation."""
    every: PositiveInt = 1
    """Measure in every n-th round, and in the first and the last."""
    finetuned: Boolean = True
    """Measure clients' locally trained adapters too: the gain of finetuning, which FedMerge wants small."""


Tracker = Literal[
    "tensorboard", "mlflow", "wandb", "trackio", "comet_ml", "aim", "clearml", "dvclive", "swanlab"
]


class Recipe(Section):
    """A whole run: task, backbone, adapter, data, strategy, training."""

    name: str
    """Name of the run; its directory is runs/NAME unless --out says otherwise."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Every random choice comes from it, the round and the client."""
    rounds: PositiveInt = 20
    """Rounds of communication."""
    task: AnyTask
    """What an example is, and how it is scored."""
    backbone: BackboneRecipe
    """The frozen pretrained model."""
    lora: LoraRecipe = LoraRecipe()
    """The adapter that trains and travels."""
    data: DataRecipe
    """Examples and clients."""
    strategy: AnyStrategy = FedMergeRecipe()
    """What each client is sent, and what the replies change."""
    baselines: list[AnyStrategy] = []
    """Strategies to run beside it on the same clients and seed, each in a run directory below this one's. The run's own is skipped."""
    clients: ClientsRecipe = ClientsRecipe()
    """Who takes part in a round."""
    robustness: RobustnessRecipe = RobustnessRecipe()
    """What the server does about hostile clients."""
    privacy: PrivacyRecipe = PrivacyRecipe()
    """How much the adapters may tell about a client."""
    training: TrainingRecipe = TrainingRecipe()
    """What one client does in one round."""
    evaluation: EvaluationRecipe = EvaluationRecipe()
    """What is measured."""
    tracking: list[Tracker] = []
    """Experiment trackers that get each round's numbers, such as [tensorboard]; their packages must be installed. Those that write files
    write them to the run directory's folder tracking."""
    callbacks: list[AnyCallback] = []
    """Callbacks to attach to the run, such as [my_callback] or [{name: my_callback, every: 5}]; plugins register them."""
    plugins: list[str] = []
    """Python modules to import before the recipe is read, such as [my_plugin]; each registers strategies, tasks, partition schemes,
    metrics, aggregation rules or callbacks. They must be importable: installed, or in a folder on PYTHONPATH."""

    @model_validator(mode="after")
    def _distinct_baselines(self) -> Recipe:
        names = [baseline.name for baseline in self.baselines]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"baselines: each strategy may appear once, and {', '.join(repeated)} appears again"
            )
        return self

    @model_validator(mode="after")
    def _private_in_all_that_is_shared(self) -> Recipe:
        for strategy in (self.strategy, *self.baselines):
            if said := self.privacy.refusal(strategy):
                raise ValueError(said)
        if self.privacy.mode == "central" and self.robustness.defends:
            raise ValueError(
                "privacy.mode: central noise is for means of updates clipped to privacy.clip; leave robustness out, or use local"
            )
        return self

    @model_validator(mode="after")
    def _mixtures_generate_no_text(self) -> Recipe:
        generated = [name for name in self.task.metrics if compares_texts(name)]
        mixing = [each for each in (self.strategy, *self.baselines) if not each.single_adapter]
        if generated and mixing:
            raise ValueError(
                f"task: the metric {generated[0]} needs generated text, and the mixture of adapters that {mixing[0].name} serves gives none; "
                "use perplexity or accuracy, or another strategy"
            )
        return self

    @classmethod
    def load(cls, source: str | PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
        """Read a shipped recipe by name, or a YAML file by path, then apply ``key.sub=value`` overrides.

        Overrides win over the file, the file over the defaults. Raises ``RecipeError`` with every fault at once.
        """
        from fedmerge_peft.recipe.loading import load

        return load(cls, source, overrides)

    def replace(self, overrides: Iterable[str]) -> Recipe:
        """A copy with ``key.sub=value`` overrides applied. Raises ``RecipeError``."""
        from fedmerge_peft.recipe.loading import override

        return override(self, overrides)

    def to_yaml(self) -> str:
        """The whole recipe, defaults written out, as YAML that ``Recipe.load`` reads back equal."""
        from fedmerge_peft.recipe.loading import dump

        return dump(self)
