"""The Python API: run, resume and sweep recipes, and use finished runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmerge_peft.errors import FedMergeError, RunError
from fedmerge_peft.federation import federate as running
from fedmerge_peft.federation import sweep as sweeping
from fedmerge_peft.federation.callbacks import Callback
from fedmerge_peft.federation.notebook_progress import notebook_callbacks, sweep_progress
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.recipe.python_values import check_recipes
from fedmerge_peft.report.notebook import run_html
from fedmerge_peft.report.run_plots import RunPlots
from fedmerge_peft.runs.directory import RunDirectory
from fedmerge_peft.runs.passed_model import check_model, with_model
from fedmerge_peft.serving.merged_adapter import MergedAdapter, client_adapter, mixed_adapter
from fedmerge_peft.tasks.in_memory import take_model

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fedmerge_peft.data.in_memory import Data
    from fedmerge_peft.engines.base import Engine
    from fedmerge_peft.runs.record import RoundRecord
    from fedmerge_peft.serving.predictor import Prediction
    from fedmerge_peft.tasks.base import ComputeMetrics
    from fedmerge_peft.tasks.in_memory import PassedModel


class Run(RunDirectory):
    """A run directory, with methods for predictions and for merging and saving adapters."""

    def __init__(
        self, path: Path, *, trust_remote_code: bool = False, model: PassedModel | None = None
    ) -> None:
        super().__init__(path, trust_remote_code=trust_remote_code)
        self._model = model  # kept in memory for predictions

    def client(self, name: str, *, best: bool = False) -> MergedAdapter:
        """Return the merged adapter that serves a client.

        ``run.client("north-clinic").pipeline()("my order has not come")``

        Args:
            name: The client's name.
            best: Use the round with the lowest validation loss instead of the served round.

        Raises:
            RunError: The run has no such client; it has no completed round or, with ``best``, no
                saved best round; or its clients have no single adapter (``fedem``).
        """
        return client_adapter(self, name, best=best)

    def merge(self, shares: Mapping[str | int, float], *, best: bool = False) -> MergedAdapter:
        """Return a weighted mean of adapters: rows of the soup, clients' adapters, or both.

        ``run.merge({0: 1, 2: 1})`` is the mean of adapter 0 and adapter 2.
        ``run.merge({"Fen Water": 3, "Castle Museum": 1})`` weights these clients' adapters 3 to 1.

        Args:
            shares: Shares by adapter number or client name; they are divided by their sum.
            best: Use the round with the lowest validation loss instead of the served round.

        Raises:
            RunError: An adapter or client does not exist, a share is negative or not finite, or all
                shares are 0; ``shares`` names an adapter although parts of the adapters are
                private to the clients; the run has no completed round or, with ``best``, no saved
                best round; or its clients have no single adapter (``fedem``).
        """
        return mixed_adapter(self, shares, best=best)

    def predict(
        self, inputs: Mapping[str, Iterable[Any]], *, best: bool = False, device: str = "auto"
    ) -> dict[str, list[Prediction]]:
        """Predict with each client's own adapter: ``run.predict({"north-clinic": ["..."]})``.

        Each call loads the model; use ``Predictor`` for repeated calls. See ``Predictor`` for
        inputs, predictions and errors.
        """
        from fedmerge_peft.serving.predictor import Predictor

        return Predictor(self, best=best, device=device)(inputs)

    def adapter(self, client: str, *, best: bool = False) -> dict[str, Tensor]:
        """Return the tensors of a client's merged adapter, by their names in PEFT's saved form.

        Raises the errors of ``client``.
        """
        return self.client(client, best=best).peft_state()[0]

    def save_adapter(
        self, client: str, folder: Path | str, *, best: bool = False, exact: bool = False
    ) -> Path:
        """Write a client's merged adapter as a PEFT folder with a model card; return the folder.

        ``MergedAdapter.save`` describes ``folder``, ``exact`` and the errors. The errors of
        ``client`` are raised too.
        """
        return self.client(client, best=best).save(folder, exact=exact)

    @property
    def plot(self) -> RunPlots:
        """Figures of the run, such as ``run.plot.accuracy()``.

        The figures are ``accuracy``, ``loss``, ``weights``, ``clients`` and ``traffic``. Notebooks
        show a figure; its method ``save(path)`` writes it to a file.
        """
        return RunPlots(self)

    def _repr_html_(self) -> str:
        return run_html(self)


def load_run(
    path: Path | str,
    *,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    processor: Any = None,
    trust_remote_code: bool = False,
) -> Run:
    """Open a run directory.

    Args:
        path: The run directory. It may come from an untrusted source.
        model: The model in memory that was passed to ``federate``, for predictions and training.
            Tables, reports and exports do not need it.
        tokenizer: As in ``federate``.
        processor: As in ``federate``.
        trust_remote_code: Consent to run code that the run's recipe names: the modules under
            ``plugins``, and code that comes with a model (``backbone.trust_remote_code``).

    Raises:
        RunError: The path is not a run directory, contains links, or has an unsupported format.
        ResumeError: The run was not trained with the passed model.
        BackboneError: The passed model cannot be used.
    """
    if not isinstance(path, str | Path):
        raise RunError(f"path: found {path!r}, expected the path of a run directory")
    passed = take_model(model, tokenizer, processor)
    run = Run.open(path, trust_remote_code=trust_remote_code)
    if passed is not None:
        check_model(run, with_model(run.recipe, passed))
        run = Run(run.path, trust_remote_code=trust_remote_code, model=passed)
    return run


def federate(
    recipe: Recipe,
    out: Path | str | None = None,
    *,
    data: Data | None = None,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    processor: Any = None,
    metrics: ComputeMetrics | None = None,
    engine: Engine | None = None,
    callbacks: Sequence[Callback] = (),
) -> Run:
    """Run a recipe and its baselines.

    On several ranks, every rank calls this function. An error on one rank is raised on all.

    Args:
        recipe: The recipe.
        out: The run directory. Default: ``runs/<name>``. Baselines are written to
            ``<out>/baselines/<strategy>``.
        data: Examples, instead of those at ``data.path``: a ``datasets.Dataset``, a pandas frame, a
            ``DatasetDict`` or a pair (train, test), which the recipe partitions among clients; or a
            dictionary with one of these for each client. The run stores only their fingerprint.
        model: A loaded model, instead of ``backbone.model``: a model of transformers, or a module
            whose ``forward(**batch)`` returns logits. Runs train copies and store only the model's
            fingerprint.
        tokenizer: The model's tokenizer, for texts.
        processor: The model's image processor, or a function from a PIL image to an array
            ``(channels, height, width)``.
        metrics: ``compute_metrics(predictions, references)``, which returns further scores by name.
            Its arguments are texts if the recipe has a metric of generated texts. Otherwise they
            follow from the task: class ids, token ids, or numbers for regression, for example.
        engine: Loaded data and model. Default: load those of the recipe.
        callbacks: Callbacks in addition to those of the recipe. Notebooks also show the progress.

    Returns:
        The run of the recipe's strategy; ``run.baselines`` contains the runs of its baselines.

    Raises:
        RunExistsError: The path is a file, or a directory that is not empty. Nothing was changed.
        RunBusyError: Another process is writing the directory. Nothing was changed.
        BackboneError: The model or its processor cannot be loaded or used, or does not suit the
            recipe.
        TypeError: An object in ``callbacks`` is not a ``Callback``.
        FedMergeError: The run fails for another reason. If it had begun, its finished rounds are
            kept, and ``resume`` continues it.

    An exception of a callback ends the run in the same way.
    """
    passed = take_model(model, tokenizer, processor)
    path = running.run_recipe(
        recipe,
        out,
        data=data,
        model=passed,
        metrics=metrics,
        engine=engine,
        callbacks=[*notebook_callbacks(), *callbacks],
    )
    # Consent: the caller passed the recipe whose code has just run.
    return Run(path, trust_remote_code=True, model=passed)


def resume(
    path: Path | str,
    overrides: Iterable[str] = (),
    *,
    data: Data | None = None,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    processor: Any = None,
    metrics: ComputeMetrics | None = None,
    engine: Engine | None = None,
    callbacks: Sequence[Callback] = (),
    trust_remote_code: bool = False,
) -> Run:
    """Resume an interrupted run from its last finished round, or extend a finished one.

    The result equals that of an uninterrupted run. The number of ranks may differ from before.

    Args:
        path: The run directory.
        overrides: New values as ``key=value``, for ``name``, ``rounds``, ``stop``,
            ``evaluation.every``, ``tracking``, ``callbacks`` or ``plugins``.
        data: The examples that were passed to ``federate``. Other examples raise an error.
        model: The model that was passed to ``federate``. Other models raise an error.
        tokenizer: As in ``federate``.
        processor: As in ``federate``.
        metrics: As in ``federate``. The run does not store the function.
        engine: Loaded data and model. Default: load those of the run's recipe.
        callbacks: Callbacks in addition to those of the recipe. Notebooks also show the progress.
        trust_remote_code: As in ``load_run``.

    Returns:
        The finished run.

    Raises:
        RecipeError: An override is not allowed, or sets fewer rounds than are completed. Nothing
            was changed.
        ResumeError: The run has ended, and ``overrides`` changes neither ``rounds`` nor, if it
            stopped early, ``stop``; its data, model, recipe or checkpoints have changed; or
            examples or a model in memory, with which it started, are not passed again.
        RunBusyError: Another process is writing the run. Nothing was changed.
        FedMergeError: Any other error, as in ``federate``.
    """
    run = Run.open(path, trust_remote_code=trust_remote_code)
    passed = take_model(model, tokenizer, processor)
    running.resume_run(
        run,
        overrides,
        data=data,
        model=passed,
        metrics=metrics,
        engine=engine,
        callbacks=[*notebook_callbacks(), *callbacks],
    )
    return Run(run.path, trust_remote_code=trust_remote_code, model=passed)


def sweep(
    recipes: Mapping[str, Recipe],
    out: Path | str,
    *,
    data: Data | None = None,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    processor: Any = None,
    on_run: Callable[[str, Run, bool], None] | None = None,
    on_failure: Callable[[str, FedMergeError], None] | None = None,
    on_round: Callable[[str, RoundRecord], None] | None = None,
) -> dict[str, Run]:
    """Run several recipes, each in its own run directory ``out/<name>``.

    A repeated call continues the sweep: finished runs are kept and interrupted ones are resumed. An
    interrupted run that has no completed round or cannot be resumed is removed and started again.
    Recipes with equal seed, task, backbone, LoRA, data, device, precision, packing and prefix cache
    share the loaded data and model, and run one after another, regardless of their order in
    ``recipes``. Several processes may share a sweep: each takes runs that no other process
    is writing, then waits for the others.

    Args:
        recipes: Recipes by the names of their run directories; ``expand`` returns such a mapping.
        out: The folder of the run directories, created if needed.
        data: Examples of all recipes, as in ``federate``.
        model: Model of all recipes, with its tokenizer or processor, as in ``federate``.
        tokenizer: As in ``federate``.
        processor: As in ``federate``.
        on_run: Called with the name, the run, and True if this call has run it, else False. Runs
            that had already ended are reported first.
        on_failure: Called with the name and the error of a recipe that failed. Other recipes still
            run.
        on_round: Called with the name and the record after each round, baselines included.
            Notebooks also show the progress.

    Returns:
        The finished runs, in the order of ``recipes``.

    Raises:
        RecipeError: A name is not a valid folder name, or ``recipes`` does not map names to
            recipes; nothing was started.
        BackboneError, DataError: ``model`` or ``data`` cannot be used; nothing was started.
        DeviceError: A launcher such as ``torchrun`` has started several ranks.
        RunError: A directory contains the run of another recipe, or other files; nothing was
            started.
        SweepError: Some recipes failed; raised after all others have run.
    """
    check_recipes(recipes)
    progress = sweep_progress(len(recipes))

    def report(name: str, path: Path, fresh: bool) -> None:
        run = Run(path, trust_remote_code=True, model=passed)
        if progress is not None:
            progress.ended(name, run)
        if on_run is not None:
            on_run(name, run, fresh)

    def report_failure(name: str, error: FedMergeError) -> None:
        if progress is not None:
            progress.failed(name, error)
        if on_failure is not None:
            on_failure(name, error)

    def callbacks(name: str) -> list[Callback]:
        hooks = [] if on_round is None else [Callback(on_round=partial(on_round, name))]
        return hooks if progress is None else [*hooks, progress.begin(name)]

    passed = take_model(model, tokenizer, processor)
    paths = sweeping.run_sweep(recipes, out, report, report_failure, callbacks, data, passed)
    return {name: Run(path, trust_remote_code=True, model=passed) for name, path in paths.items()}
