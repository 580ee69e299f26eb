"""What a person calls: run a recipe, resume, sweep, and work with what a run left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmerge_peft.federation import federate as running
from fedmerge_peft.federation import sweep as sweeping
from fedmerge_peft.federation.callbacks import Callback
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.runs.directory import RunDirectory
from fedmerge_peft.serving.merged_adapter import MergedAdapter, client_adapter, mixed_adapter

if TYPE_CHECKING:
    from torch import Tensor

    from fedmerge_peft.engines.base import Engine
    from fedmerge_peft.errors import FedMergeError
    from fedmerge_peft.runs.record import RoundRecord
    from fedmerge_peft.serving.predictor import Prediction


class Run(RunDirectory):
    """A run and everything one does with it: read its scores, predict, merge, save adapters."""

    def client(self, name: str, *, best: bool = False) -> MergedAdapter:
        """Return the adapter that a client is served with, ready to use.

        ``run.client("north-clinic").pipeline()("my order has not come")``

        Args:
            name: The client's name.
            best: Take the round with the lowest validation loss instead of the last.

        Raises:
            RunError: There is no such client, or no such round.
        """
        return client_adapter(self, name, best=best)

    def merge(self, shares: Mapping[str | int, float], *, best: bool = False) -> MergedAdapter:
        """Return an adapter merged in other proportions than any client's.

        ``run.merge({0: 1, 2: 1})`` is half of adapter 0 and half of adapter 2.
        ``run.merge({"Fen Water": 3, "Castle Museum": 1})`` weighs these clients' adapters 3 to 1.

        Args:
            shares: Parts by adapter number or by client name; they are divided by their sum.
            best: Take the round with the lowest validation loss instead of the last.

        Raises:
            RunError: No such adapter or client, a negative or infinite part, or only zeros.
        """
        return mixed_adapter(self, shares, best=best)

    def predict(
        self, inputs: Mapping[str, Sequence[Any]], *, best: bool = False, device: str = "auto"
    ) -> dict[str, list[Prediction]]:
        """Predict with each client's own adapter: ``run.predict({"north-clinic": ["..."]})``.

        The model is loaded at each call; ``Predictor`` keeps it, and documents inputs, predictions
        and errors.
        """
        from fedmerge_peft.serving.predictor import Predictor

        return Predictor(self, best=best, device=device)(inputs)

    def adapter(self, client: str, *, best: bool = False) -> dict[str, Tensor]:
        """Return a client's merged adapter by PEFT's saved names. Raises ``RunError``."""
        return self.client(client, best=best).peft_state()[0]

    def save_adapter(
        self, client: str, folder: Path | str, *, best: bool = False, exact: bool = False
    ) -> Path:
        """Write a client's merged adapter as a folder that ``PeftModel.from_pretrained`` loads."""
        return self.client(client, best=best).save(folder, exact=exact)

    def _repr_html_(self) -> str:
        from html import escape

        rounds, clients = self.metrics.tail(5).to_html(), self.clients.head(50).to_html()
        return f"<p>{escape(repr(self))}</p>{rounds}{clients}"


def load_run(path: Path | str) -> Run:
    """Open a run directory. Raises ``RunError`` if there is none."""
    return Run.open(path)


def federate(
    recipe: Recipe,
    out: Path | str | None = None,
    *,
    engine: Engine | None = None,
    callbacks: Sequence[Callback] = (),
) -> Run:
    """Run a whole recipe, and its baselines, into a run directory.

    On several ranks all of them call this. What one rank raises, all raise.

    Args:
        recipe: The recipe.
        out: The run directory; by default ``runs/<name>``. Baselines go to
            ``<out>/baselines/<strategy>``.
        engine: Loaded data and model; by default those that the recipe names.
        callbacks: Hooks into the run, called beside those that the recipe names.

    Returns:
        The run of the recipe's own strategy; ``run.baselines`` has the others.

    Raises:
        RunExistsError: The directory is not empty. Nothing was touched.
        RunBusyError: Another process is writing it. Nothing was touched.
        FedMergeError: Any other fault; finished rounds stay on disk and ``resume`` continues.
    """
    return Run(running.run_recipe(recipe, out, engine=engine, callbacks=callbacks))


def resume(
    path: Path | str,
    overrides: Iterable[str] = (),
    *,
    engine: Engine | None = None,
    callbacks: Sequence[Callback] = (),
) -> Run:
    """Continue an interrupted run from its last finished round.

    The result equals that of an uninterrupted run. The number of ranks may differ from before.

    Args:
        path: The run directory.
        overrides: ``rounds=N``, for more rounds than were asked for (also of a run that has ended)
            or fewer, or ``evaluation.every=N``.
        engine: Loaded data and model; by default those that the run's recipe names.
        callbacks: Hooks into the run, called beside those that the recipe names.

    Returns:
        The finished run.

    Raises:
        RecipeError: Overrides of anything else, or fewer rounds than are done. Nothing was touched.
        ResumeError: The run has ended, or its data, recipe or checkpoints have changed.
        RunBusyError: Another process is writing it. Nothing was touched.
        FedMergeError: As ``federate``.
    """
    return Run(running.resume_run(path, overrides, engine=engine, callbacks=callbacks))


def sweep(
    recipes: Mapping[str, Recipe],
    out: Path | str,
    *,
    on_run: Callable[[str, Run, bool], None] | None = None,
    on_failure: Callable[[str, FedMergeError], None] | None = None,
    on_round: Callable[[str, RoundRecord], None] | None = None,
) -> dict[str, Run]:
    """Run each recipe into ``out/<name>``; the same call again only does what is left.

    Finished runs are kept and interrupted ones resumed. Recipes that agree on data and model share
    them: these run one after another, whatever their order in ``recipes``. Several processes may
    share a sweep: each takes runs that no other is writing, then waits for the others.

    Args:
        recipes: Recipes by the names of their run directories; ``expand`` makes such a mapping.
        out: The folder of the run directories; made if it is missing.
        on_run: Called with the name, the run, and whether it was run by this call; runs that had
            ended before come first.
        on_failure: Called with the name and the error of a recipe that failed. The others go on.
        on_round: Called with the name and the record after each round, baselines included.

    Returns:
        The finished runs, in the order of ``recipes``.

    Raises:
        RecipeError: A name that cannot name a folder; nothing was started.
        DeviceError: A launcher has started several ranks of this process.
        RunError: A directory holds the run of another recipe, or files that no run writes; nothing
            was started.
        SweepError: Some recipes failed; raised after all the others have run.
    """

    def report(name: str, path: Path, fresh: bool) -> None:
        if on_run is not None:
            on_run(name, Run(path), fresh)

    paths = sweeping.run_sweep(recipes, out, report, on_failure, on_round)
    return {name: Run(path) for name, path in paths.items()}
