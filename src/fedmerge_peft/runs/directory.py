"""The run directory: all output of a run, and the only input of reports and notebooks.

recipe.yaml             the recipe with all defaults
environment.json        format version, start time, versions, git commit, device, precision; each
                        time the run is resumed, one more entry under "resumed"
decisions.json          values for keys of training that are auto, with reasons and the range test
clients.json            name, group and number of examples of each client
task.json               label names in the order of their ids, text format, and padding
examples.json           digest of the examples (not across sites)
labels.json             training examples of each client by label, if examples have labels
confusion.json          after the end: test examples of each client by true and predicted class
adapter_config.json     PEFT's configuration of the adapters
metrics.jsonl           one object per round
weights/                π after each round
soup.safetensors        adapters after the last finished round, and updates of the backbone (flora,
                        fedex_lora); after the end of the run, both are from the served round
weights.safetensors     π after the same round
best/                   soup, weights and scores at the lowest mean validation loss of all clients
privacy.json            how often each round counts toward ε, if the recipe has privacy
summary.json            at the end: scores after the last, the best and the served round ("final")
tracking/               files of experiment trackers (tracking.py)
checkpoint/             the state to resume from (checkpoint.py)
baselines/<strategy>/   a run directory for each baseline
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from fedmerge_peft.adapters.soup import AdapterSoup
from fedmerge_peft.data.columns import no_client
from fedmerge_peft.errors import BackboneError, FedMergeError, RecipeError, RunError, RunExistsError
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.recipe.loading import RUN_REMEDY, Consent, Plugins, loads
from fedmerge_peft.runs import documents
from fedmerge_peft.runs.cached_files import CachedFiles
from fedmerge_peft.runs.cleanup import is_temporary, refuse_links
from fedmerge_peft.runs.formats import check_format
from fedmerge_peft.runs.frames import clients_frame, label_counts_frame, metrics_frame
from fedmerge_peft.runs.states import read_client_weights, read_state
from fedmerge_peft.training.hyperparameters import Hyperparameters
from fedmerge_peft.util import checked

if TYPE_CHECKING:
    import pandas as pd

    from fedmerge_peft.recipe.schema import TrainingRecipe

log = logging.getLogger(__name__)


class RunDirectory:
    """Reader of a run directory; ``RunWriter`` writes one, ``api.Run`` adds adapters and plots."""

    def __init__(self, path: Path, *, trust_remote_code: bool = False) -> None:
        self.path = path
        self.trust_remote_code = trust_remote_code
        """Consent to run code that the recipe names: plugins, and code that comes with a model."""
        self._files = CachedFiles()

    @staticmethod
    def default_path(recipe: Recipe) -> Path:
        """Return ``runs/<name>``. Raises ``RecipeError`` if the name is not a folder name."""
        name = recipe.name
        if Path(name).name != name or name in ("", "..") or "\0" in name:
            raise RecipeError(
                f"name: {name!r} is not a valid folder name; "
                "choose another, or give a run directory (--out, or out in Python)"
            )
        return Path("runs") / name

    @staticmethod
    def check_free(path: Path) -> None:
        """Raise ``RunExistsError`` unless nothing but temporary files is at the path."""
        if path.exists() and (
            not path.is_dir() or any(not is_temporary(file.name) for file in path.iterdir())
        ):
            free = RunDirectory.free_path(path)
            content = "a run" if (path / "recipe.yaml").exists() else "other files"
            state = f"already holds {content}" if path.is_dir() else "is not a folder"
            resume = (
                f"Resume the unfinished run with {command}, or choose"
                if (command := RunDirectory(path).resume_command)
                else "Choose"
            )
            raise RunExistsError(
                f"{path} {state}; existing files are never overwritten. "
                f"{resume} another directory, such as {free}",
                free,
            )

    @staticmethod
    def free_path(path: Path) -> Path:
        """Return the first of ``path-2``, ``path-3``, ... that does not exist."""
        path = path if path.name else Path.cwd() / "run"  # "" and the root have no name
        numbered = (path.with_name(f"{path.name}-{n}") for n in range(2, 10_000))
        return next(candidate for candidate in numbered if not candidate.exists())

    @property
    def ended(self) -> bool:
        """True if the run and its baselines have ended, after all rounds or early."""
        return all(
            RunDirectory(path).ended_for == recipe.rounds
            for recipe, path in with_baselines(self.recipe, self.path)
        )

    @property
    def ended_for(self) -> int | None:
        """Planned rounds of a run that has ended, even if it stopped early; None before the end.

        A damaged summary counts as missing, because resuming writes it again.
        """
        try:
            stopped = self.summary.get("stopped")
            return int(stopped["planned"] if stopped else self.summary["rounds"])
        except checked.DamagedError as error:
            log.warning("%s. fedmerge resume writes it again", checked.without_remedy(error))
        except RunError:  # not ended
            pass
        return None

    @property
    def resume_command(self) -> str | None:
        """The command that resumes the run; None if it has ended or there is no readable run."""
        try:
            run = RunDirectory.open(self.path, trust_remote_code=self.trust_remote_code)
            ended, recipe = run.ended, run.recipe
        except (FedMergeError, ValueError, KeyError):
            return None
        needs_code = bool(recipe.plugins) or recipe.backbone.trust_remote_code
        consent = ["--trust-remote-code"] if needs_code and self.trust_remote_code else []
        return None if ended else shlex.join(["fedmerge", "resume", str(self.path), *consent])

    @classmethod
    def open(cls, path: Path | str, *, trust_remote_code: bool = False) -> Self:
        """Open a run, finished or not.

        Args:
            path: The run directory. It may come from an untrusted source.
            trust_remote_code: Consent to run code that its recipe names.

        Raises:
            RunError: It is no run directory, has symbolic links or another format, or is damaged.
        """
        path = Path(path)
        if not (path / "recipe.yaml").is_file():
            raise RunError(
                f"{path} holds no run (no recipe.yaml); give the folder of a run, or create one "
                "with fedmerge run RECIPE"
            )
        refuse_links(path)
        check_format(path)
        return cls(path, trust_remote_code=trust_remote_code)

    @property
    def recipe(self) -> Recipe:
        """The run's recipe, read again if the file has changed: ``resume`` may add rounds.

        Raises ``RunError`` if the file is missing or damaged, and ``RecipeError`` if the recipe is
        invalid or would import plugins without consent.
        """
        recipe: Recipe = self._files.get(self.path / "recipe.yaml", self._load_recipe)
        return recipe

    def _load_recipe(self, path: Path) -> Recipe:
        plugins: Plugins = "import" if self.trust_remote_code else Consent((), RUN_REMEDY)
        text = checked.read_text(path)
        return loads(Recipe, text, str(path), plugins=plugins, foreign=True)

    @property
    def trusted_recipe(self) -> Recipe:
        """The run's recipe, after a check that its model may be loaded.

        Raises:
            RecipeError, RunError: As for ``recipe``.
            BackboneError: The model may run code that comes with it, without consent.
        """
        recipe = self.recipe
        if recipe.backbone.trust_remote_code and not self.trust_remote_code:
            raise BackboneError(
                f"{self.path / 'recipe.yaml'}: backbone.trust_remote_code: loading "
                f"{recipe.backbone.model} may run code that comes with it; {RUN_REMEDY}"
            )
        return recipe

    @property
    def records(self) -> list[dict[str, Any]]:
        """The objects of ``metrics.jsonl``, by round. Raises ``RunError`` if it is damaged."""
        path = self.path / "metrics.jsonl"
        records: list[dict[str, Any]] = self._files.get(path, documents.read_rounds)
        checkpoints = (self.path / "checkpoint").glob("round-*[0-9].safetensors")
        if len(records) < max(map(round_of, checkpoints), default=0):
            raise checked.damaged(path, "it lacks finished rounds")
        return records

    @property
    def rounds_on_disk(self) -> int:
        """Number of lines of ``metrics.jsonl``, even if the file is damaged."""
        path = self.path / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    @property
    def environment(self) -> dict[str, Any]:
        """The content of ``environment.json``; empty if the file does not exist."""
        path = self.path / "environment.json"
        return documents.read(path) if path.is_file() else {}

    @cached_property
    def decisions(self) -> dict[str, dict[str, Any]]:
        """The content of ``decisions.json`` by key of ``training``; empty if there is none.

        Raises:
            RunError: The file cannot be read, or has invalid values.
        """
        path = self.path / "decisions.json"
        if not path.is_file():
            return {}
        try:
            document = documents.read(path)
            Hyperparameters.parse({key: entry["value"] for key, entry in document.items()})
        except (RunError, ValueError) as error:
            reason = f"{path} cannot be read ({checked.without_remedy(error)}); restore it from a"
            raise RunError(f"{reason} copy, or remove it before fedmerge resume") from error
        return document

    @property
    def training(self) -> TrainingRecipe:
        """The recipe's section ``training``, with the values that the run has chosen."""
        values = {key: entry["value"] for key, entry in self.decisions.items()}
        return Hyperparameters.parse(values).apply_to(self.recipe.training)

    @property
    def summary(self) -> dict[str, Any]:
        """The content of ``summary.json``. Raises ``RunError`` if the run has not ended."""
        path = self.path / "summary.json"
        if not path.exists():
            raise RunError(
                f"{self.path} has not ended: {len(self.records)} of {self.recipe.rounds} rounds "
                "are done; continue it with fedmerge resume"
            )
        return self._files.get(path, documents.read)  # type: ignore[no-any-return]

    @property
    def last_scores(self) -> dict[str, Any] | None:
        """Scores of the models served after the last round; None if no client has scores.

        Raises ``RunError`` if the run has not ended.
        """
        return self.summary["last"]["served"]  # type: ignore[no-any-return]

    @property
    def metrics(self) -> pd.DataFrame:
        """One row per round: losses, means and worst tenths, entropy, gap, bytes, seconds."""
        return metrics_frame(self.records)

    @property
    def clients(self) -> pd.DataFrame:
        """One row per client: group, numbers of examples and, after the end, final scores."""
        final = self.summary["final"]["served"] if (self.path / "summary.json").exists() else None
        return clients_frame(self._clients, final["clients"] if final else None)

    @property
    def client_names(self) -> list[str]:
        """The clients' names, in the order of the rows of π."""
        return [str(client["name"]) for client in self._clients]

    @property
    def label_counts(self) -> pd.DataFrame | None:
        """Numbers of training examples, clients × labels; None if examples have no labels."""
        document = documents.read_labels(self.path / "labels.json", len(self._clients))
        return label_counts_frame(document, self.client_names) if document else None

    @property
    def weights(self) -> pd.DataFrame:
        """Served π, clients × adapters; its mean over the parameters if it differs by block."""
        import pandas as pd

        weights = read_client_weights(self.path / "weights.safetensors", len(self._clients))
        return pd.DataFrame(weights.numpy(), index=self.client_names)

    def weights_by_round(self) -> Iterator[tuple[int, Tensor]]:
        """Yield each finished round and π ``(clients, adapters)`` after it."""
        for path in sorted((self.path / "weights").glob("round-*.safetensors")):
            yield round_of(path), read_client_weights(path, len(self._clients))

    @property
    def soup(self) -> AdapterSoup:
        """The adapters that the run serves; before the end, the adapters after the last round."""
        return AdapterSoup.load(self.path / "soup.safetensors")

    def state(self, *, best: bool = False) -> tuple[AdapterSoup, Tensor]:
        """Return the soup and π ``(clients, adapters)`` of the served or the best state.

        Raises:
            RunError: There is no such state, or its files are damaged.
        """
        folder = self.path / "best" if best else self.path
        if best and not folder.is_dir():
            raise RunError(
                f"{self.path} has no best round: it is private, its clients have no validation "
                "examples, or no round evaluated all of them; omit --best, or best=True in Python"
            )
        return read_state(folder, len(self._clients))

    def weights_of(self, client: str, weights: Tensor) -> Tensor:
        """Return a client's row of π. Raises ``RunError`` if the run has no such client."""
        names = self.client_names
        if client not in names:
            raise RunError(f"{self.path} {no_client(client, names)}")
        return weights[names.index(client)]

    def round(self, *, best: bool = False) -> int:
        """Return the number of completed rounds in the served or the best state.

        With ``best``, return the served state's number if no best state was saved.
        """
        if best and self._best:
            return int(self._best["after_round"])
        ended = (self.path / "summary.json").is_file()
        return int(self.summary["final"]["after_round"]) if ended else len(self.records)

    def scores(self, *, best: bool = False) -> dict[str, dict[str, float]]:
        """Return each client's scores in the served or the best state, such as ``test_accuracy``.

        Empty if that state was not evaluated. The served state has no scores before the end.
        """
        if best:
            served = self._best["served"] if self._best else None
        else:
            ended = (self.path / "summary.json").is_file()
            served = self.summary["final"]["served"] if ended else None
        return dict(served["clients"]) if served else {}

    @property
    def task(self) -> dict[str, Any]:
        """``labels`` in the order of their ids, ``format`` of texts or None, and ``padding``."""
        path = self.path / "task.json"
        if not path.is_file():
            raise RunError(
                f"{path} is missing, so label names are unknown; run the recipe again to write it"
            )
        return documents.read(path)

    @property
    def adapter_config(self) -> dict[str, Any]:
        """PEFT's configuration of the adapters."""
        return documents.read(self.path / "adapter_config.json")

    @property
    def baselines(self) -> dict[str, Self]:
        """The runs of the recipe's baselines that have started, by strategy."""
        paths = {part.name: self.baseline_path(part.name) for part in self.recipe.baselines}
        return {
            name: self.open(path, trust_remote_code=self.trust_remote_code)
            for name, path in paths.items()
            if (path / "recipe.yaml").is_file()
        }

    def baseline_path(self, strategy: str) -> Path:
        """Return the run directory of a baseline."""
        return self.path / "baselines" / strategy

    def __repr__(self) -> str:
        done = f"{len(self.records)} of {self.recipe.rounds} rounds"
        return f"Run({str(self.path)!r}, {self.recipe.strategy.name}, {done})"

    @cached_property
    def _clients(self) -> list[dict[str, Any]]:
        return list(documents.read(self.path / "clients.json")["clients"])

    @cached_property
    def _best(self) -> dict[str, Any] | None:
        path = self.path / "best" / "scores.json"
        return documents.read(path) if path.exists() else None


def round_of(path: Path) -> int:
    """Return the round of a file such as ``weights/round-00007.safetensors``."""
    return int(path.stem.removeprefix("round-"))


def with_baselines(recipe: Recipe, path: Path) -> list[tuple[Recipe, Path]]:
    """Return a recipe and its baselines of other strategies, each with its run directory."""
    run = RunDirectory(path)
    alone: dict[str, Any] = {"baselines": [], "baselines_from": None}
    return [
        (recipe, path),
        *(
            (recipe.model_copy(update={**alone, "strategy": part}), run.baseline_path(part.name))
            for part in recipe.baselines
            if part.name != recipe.strategy.name
        ),
    ]
