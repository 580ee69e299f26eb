"""Log each round's scalars, and π as an image, to the experiment trackers of Accelerate.

The step of each value is the number of the round.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedmerge_peft.distributed import is_main
from fedmerge_peft.errors import RecipeError, RunError
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.recipe.diff import flat, written
from fedmerge_peft.runs.record import RoundRecord, Scores

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

log = logging.getLogger(__name__)

TRACKERS = {
    "tensorboard": "tensorboard",
    "mlflow": "mlflow",
    "wandb": "wandb",
    "trackio": "trackio",
    "comet_ml": "comet_ml",
    "aim": "aim",
    "clearml": "clearml",
    "dvclive": "dvclive",
    "swanlab": "swanlab",
}
"""Trackers that a recipe may name, and the module that each of them requires."""
FOLDER = "tracking"
"""Folder in the run directory for trackers that write files."""


def check_trackers(recipe: Recipe) -> None:
    """Raise ``RecipeError`` if a tracker of the recipe is not installed."""
    if missing := [name for name in recipe.tracking if find_spec(TRACKERS[name]) is None]:
        packages = " ".join(name.replace("comet_ml", "comet-ml") for name in missing)
        raise RecipeError(
            f"tracking: {', '.join(missing)} cannot be imported: pip install {packages}, "
            f"or remove {'them' if len(missing) > 1 else 'it'} from the recipe"
        )


class Tracking:
    """The trackers of one run. A failing tracker is dropped with a warning; the run continues."""

    def __init__(self, trackers: Iterable[Any] = ()) -> None:
        self._trackers = list(trackers)

    def record(self, record: RoundRecord) -> None:
        """Log the scalars of a finished round."""
        values: dict[str, float | None] = {
            "train_loss": record.train_loss,
            "weights_entropy": record.weights_entropy,
            "gap": record.gap,
            "seconds": record.seconds,
            "bytes_down": record.bytes_down,
            "bytes_up": record.bytes_up,
            **_scores("served", record.served),
            **_scores("finetuned", record.finetuned),
            **{
                f"mass/adapter_{number}": share
                for number, share in enumerate(record.adapter_mass or [])
            },
        }
        self._log(values, record.round)

    def weights(self, weights: Tensor, clients: Sequence[str], round: int) -> None:
        """Log π ``(clients, adapters)`` after a round as a heat map."""
        if not self._trackers:
            return
        from fedmerge_peft.plotting import render
        from fedmerge_peft.plotting.specs import Heat

        columns = [str(number) for number in range(weights.shape[1])]
        heat = Heat(
            weights.numpy(),
            clients,
            columns,
            x="adapter (number)",
            label="merging weight π",
        )
        figure = render.draw(heat, f"Merging weights after round {round}")
        self._for_each(lambda tracker: _log_figure(tracker, "merging_weights", figure, round))

    def final(self, scores: Scores | None, rounds: int) -> None:
        """Log the mean, worst tenth and validation loss of the final scores, if there are any.

        Args:
            scores: Scores of the state that the run serves.
            rounds: Number of completed rounds, which is the step of the values.
        """
        self._log(_scores("final", scores), rounds)

    def _log(self, values: dict[str, float | None], step: int) -> None:
        if known := {
            name: float(value)
            for name, value in values.items()
            if value is not None and math.isfinite(value)
        }:
            self._for_each(lambda tracker: tracker.log(known, step=step))

    def finish(self) -> None:
        """Flush and close the trackers."""
        self._for_each(lambda tracker: tracker.finish())

    def _for_each(self, call: Callable[[Any], object]) -> None:
        for tracker in list(self._trackers):
            try:
                call(tracker)
            except Exception as error:
                log.warning(
                    "tracking: %s failed and is disabled for the rest of the run: %s: %s",
                    tracker.name,
                    type(error).__name__,
                    error,
                )
                self._trackers.remove(tracker)


@contextmanager
def tracking(recipe: Recipe, path: Path, accelerator: Accelerator) -> Iterator[Tracking]:
    """Start the recipe's trackers on rank 0, and close them when the block ends.

    On other ranks, and if the recipe names no tracker, nothing is logged.

    Args:
        recipe: Names the trackers (``tracking``); its values become the tracked configuration.
        path: The run directory. tensorboard, aim and wandb write files to its folder ``tracking``.
        accelerator: The engine's accelerator. The trackers' own accelerator gets the same device
            type and precision.

    Raises:
        RunError: A tracker cannot be started.
    """
    if not recipe.tracking or not is_main():
        yield Tracking()
        return
    from accelerate import Accelerator

    folder = path / FOLDER
    name = f"{recipe.strategy.name}-seed{recipe.seed}"
    values = {
        key: value if isinstance(value, bool | int | float) else written(value)
        for key, value in flat(recipe).items()
    }
    init_options: dict[str, Any] = {
        "mlflow": {"run_name": name},
        "wandb": {"name": name, "dir": str(folder)},
        "trackio": {"name": name},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trackers = Accelerator(
            cpu=accelerator.device.type == "cpu",
            mixed_precision=accelerator.mixed_precision,
            log_with=list(recipe.tracking),
            project_dir=folder,
        )
        trackers.init_trackers(recipe.name, config=values, init_kwargs=init_options)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RunError(
            f"tracking: {', '.join(recipe.tracking)} cannot be started ({reason}); set "
            "tracking=[] to run without trackers"
        ) from error
    active = Tracking(trackers.trackers)
    try:
        yield active
    finally:
        active.finish()


def _scores(kind: str, scores: Scores | None) -> dict[str, float | None]:
    if scores is None:
        return {}
    name = scores.metric
    values = {
        f"{name}_mean": scores.mean,
        f"{name}_worst": scores.worst,
        "validation_loss": scores.validation_loss,
    }
    return {f"{kind}/{key}": value for key, value in values.items()}


def _log_figure(tracker: Any, name: str, figure: Any, step: int) -> None:
    """Log a figure in the form that the tracker accepts."""
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
    match tracker.name:
        case "tensorboard":
            tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
        case "wandb" | "swanlab":
            tracker.log_images({name: [pixels]}, step=step)
        case "aim" | "clearml":
            tracker.log_images({name: pixels}, step=step)
        case "mlflow":  # artifacts have no step
            tracker.log_figure(figure, f"{name}/round-{step:05}.png")
        # Accelerate sends only scalars to these trackers; ``tracker.tracker`` is the native object.
        case "trackio":
            from trackio import Image

            tracker.tracker.log({name: Image(pixels)}, step=step)
        case "comet_ml":
            tracker.tracker.log_image(pixels, name=name, step=step)
        case "dvclive":
            tracker.tracker.log_image(f"{name}/round-{step:05}.png", pixels)
