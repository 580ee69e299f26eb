"""The run directory: everything a run leaves behind, and the one thing that reports and notebooks read.

recipe.yaml             the recipe, defaults written out
environment.json        start, versions, git commit, device, precision; the same of each time the run went on after an interruption
clients.json            name, group and number of examples of each client
task.json               names of the labels in the order of their ids, and the format of texts, as the data told them
labels.json             how many training examples of each label each client has, where examples have labels
adapter_config.json     PEFT's configuration of the adapters
metrics.jsonl           one object a round
weights/                π after each round
soup.safetensors        the adapters after the last finished round, and what the backbone has gained beside them (flora)
weights.safetensors     π after the last finished round
best/                   soup and weights at the lowest mean validation loss over all clients
summary.json            the final and the best scores; there once the run has ended
tracking/               what experiment trackers wrote (tracking.py)
checkpoint/             what the run needs to go on after an interruption (checkpoint.py)
baselines/<strategy>/   the same again for each baseline
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from fedmerge_peft.adapters.soup import AdapterSoup
from fedmerge_peft.errors import FedMergeError, RecipeError, RunError, RunExistsError
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.util.files import read_tensors, writing

if TYPE_CHECKING:
    import pandas as pd


_WRITTEN = re.compile(
    r"(baselines/[^/]+/)*"
    r"((recipe\.yaml|(environment|clients|task|labels|adapter_config|summary)\.json|metrics\.jsonl|weights/round-\d+\.safetensors)"
    r"|(best/)?(soup|weights)\.safetensors|best/scores\.json|checkpoint/round-\d+(\.soup)?\.safetensors|tracking/.+)"
)
"""Every file of a run directory, by its path there."""
_TEMPORARY = re.compile(r"(?<![^/])\.([^/]+)\.\d+$")
"""The name of a file that was being written; the group is that of the file."""
_MOST_NAMED = 5
"""Files that a message names."""


class RunDirectory:
    """Reads a run directory; ``RunWriter`` writes it, and ``api.Run`` adds what a person calls."""

    def __init__(self, path: Path) -> None:
        self.path = path

    # ---- the directory ------------------------------------------------------------------------------

    @staticmethod
    def default_path(recipe: Recipe) -> Path:
        """``runs/<name>``. Raises ``RecipeError`` for a name that would lead elsewhere."""
        if (
            Path(recipe.name).name != recipe.name
            or recipe.name in ("", "..")
            or "\0" in recipe.name
        ):
            raise RecipeError(
                [
                    f"name: {recipe.name!r} is no name for a folder; give another, or a run directory with --out"
                ]
            )
        return Path("runs") / recipe.name

    @staticmethod
    def check_free(path: Path) -> None:
        """Raise ``RunExistsError`` where the directory has anything in it."""
        if path.exists() and (
            not path.is_dir() or any(not _half_written(found.name) for found in path.iterdir())
        ):
            free = next(
                candidate
                for n in range(2, 10_000)
                if not (candidate := path.with_name(f"{path.name}-{n}")).exists()
            )
            what = "a run" if (path / "recipe.yaml").exists() else "other files"
            resume = (
                f"It has not ended; go on with it: {command}. Or choose"
                if (command := RunDirectory(path).resume_command)
                else "Choose"
            )
            message = f"{path} already holds {what}, and nothing is ever overwritten. {resume} another directory: --out {free}"
            raise RunExistsError(message, free)

    @property
    def ended(self) -> bool:
        """Whether all rounds are done, those of the baselines too."""
        return all(
            RunDirectory(path).rounds_ended == recipe.rounds
            for recipe, path in parts(self.recipe, self.path)
        )

    @property
    def rounds_ended(self) -> int | None:
        """After how many rounds the run ended; None where it has not. Says nothing of the baselines."""
        path = self.path / "summary.json"
        return (
            int(json.loads(path.read_text(encoding="utf-8"))["rounds"]) if path.is_file() else None
        )

    @property
    def resume_command(self) -> str | None:
        """The command that goes on with the run; None where it has ended, or there is none."""
        try:
            return (
                None
                if RunDirectory.open(self.path).ended
                else shlex.join(["fedmerge", "resume", str(self.path)])
            )
        except (
            FedMergeError,
            ValueError,
            KeyError,
        ):  # no recipe, or no summary, that this version wrote
            return None

    def check_ours(self) -> None:
        """Raise ``RunError`` where the directory has files, at any depth, that no run writes."""
        names = (path.relative_to(self.path).as_posix() for path in self.files())
        if others := sorted(
            name for name in names if not _WRITTEN.fullmatch(_TEMPORARY.sub(r"\1", name))
        ):
            named = ", ".join(
                [*others[:_MOST_NAMED], *(["..."] if len(others) > _MOST_NAMED else [])]
            )
            raise RunError(
                f"{self.path} holds an unfinished run, and files that no run writes: {named}. Move them, or choose another --out"
            )

    def clear(self) -> None:
        """Remove what an interrupted run left, and empty folders; the directory itself stays.

        The recipe goes last, so that what is left by an interruption here is an interrupted run still.

        Raises:
            RunError: There are other files too (``check_ours``), and nothing was removed; or something cannot be removed.
        """
        self.check_ours()
        with writing(self.path):
            for file in sorted(self.files(), key=lambda path: path == self.path / "recipe.yaml"):
                file.unlink()
            for folder, _, _ in os.walk(self.path, topdown=False):
                if Path(folder) != self.path:
                    Path(folder).rmdir()

    def tidy(self) -> None:
        """Remove files that were being written when the run was interrupted. Raises ``RunError``."""
        with writing(self.path):
            for path in self.files():
                if _half_written(path.relative_to(self.path).as_posix()):
                    path.unlink()

    def files(self) -> list[Path]:
        """Everything in the directory, at any depth, that is no folder; links are not followed."""
        found = ((Path(folder), [*below, *names]) for folder, below, names in os.walk(self.path))
        return [
            path
            for folder, names in found
            for name in names
            if (path := folder / name).is_symlink() or not path.is_dir()
        ]

    # ---- reading ---------------------------------------------------------------------------------

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """A run that was written before, finished or not. Raises ``RunError`` where there is none."""
        path = Path(path)
        if not (path / "recipe.yaml").is_file():
            raise RunError(
                f"{path} holds no run (no recipe.yaml); fedmerge run RECIPE --out {path} would make one"
            )
        return cls(path)

    @cached_property
    def recipe(self) -> Recipe:
        """What the run was asked to be."""
        return Recipe.load(self.path / "recipe.yaml")

    @property
    def records(self) -> list[dict[str, Any]]:
        """The objects of ``metrics.jsonl``, one a finished round."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
        return [
            json.loads(line) for line in lines[:-1]
        ]  # what follows the last line feed was cut off while it was written

    @property
    def environment(self) -> dict[str, Any]:
        """Start, versions, commit, device: what ``environment.json`` says. Older runs lack some of it."""
        path = self.path / "environment.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}

    @property
    def summary(self) -> dict[str, Any]:
        """Final and best scores. Raises ``RunError`` while the run has not ended."""
        path = self.path / "summary.json"
        if not path.exists():
            raise RunError(
                f"{self.path} has not ended: {len(self.records)} of {self.recipe.rounds} rounds are done"
            )
        return dict(json.loads(path.read_text(encoding="utf-8")))

    @property
    def metrics(self) -> pd.DataFrame:
        """One row a round: losses, means and worst clients, entropy, bytes, seconds."""
        import pandas as pd

        rows = []
        for record in self.records:
            row = {
                key: record[key]
                for key in (
                    "round",
                    "seconds",
                    "train_loss",
                    "weights_entropy",
                    "gap",
                    "bytes_down",
                    "bytes_up",
                )
            }
            for kind in ("served", "finetuned"):
                for value in ("mean", "worst", "validation_loss"):
                    row[f"{kind}_{value}"] = record[kind][value] if record[kind] else None
            rows.append(row)
        return pd.DataFrame(rows).set_index("round") if rows else pd.DataFrame()

    @property
    def clients(self) -> pd.DataFrame:
        """One row a client: group, numbers of examples, and the final scores once the run has ended."""
        import pandas as pd

        frame = pd.DataFrame(self._clients).set_index("name")
        if (self.path / "summary.json").exists() and (final := self.summary["final"]["served"]):
            frame = frame.join(pd.DataFrame.from_dict(final["clients"], orient="index"))
        return frame

    @property
    def client_names(self) -> list[str]:
        """The clients' names, in the order of the rows of π."""
        return [str(client["name"]) for client in self._clients]

    @property
    def label_counts(self) -> pd.DataFrame | None:
        """Training examples, clients × labels; None where examples have no labels, and for older runs."""
        import pandas as pd

        path = self.path / "labels.json"
        if not path.is_file():
            return None
        said = json.loads(path.read_text(encoding="utf-8"))
        return pd.DataFrame(said["counts"], index=self.client_names, columns=said["labels"])

    @property
    def weights(self) -> pd.DataFrame:
        """π after the last finished round: clients × adapters."""
        import pandas as pd

        return pd.DataFrame(
            read_tensors(self.path / "weights.safetensors")["weights"].numpy(),
            index=self.client_names,
        )

    def weights_by_round(self) -> Iterator[tuple[int, Tensor]]:
        """π ``(clients, adapters)`` after each finished round."""
        for path in sorted((self.path / "weights").glob("round-*.safetensors")):
            yield round_of(path), read_tensors(path)["weights"]

    @property
    def soup(self) -> AdapterSoup:
        """The adapters after the last finished round."""
        return AdapterSoup.load(self.path / "soup.safetensors")

    def state(self, *, best: bool = False) -> tuple[AdapterSoup, Tensor]:
        """The soup and π ``(clients, adapters)``, after the last or the best round. Raises ``RunError`` where there is none."""
        folder = self.path / "best" if best else self.path
        if best and not folder.is_dir():
            raise RunError(
                f"{self.path} kept no best round: its clients hold no validation examples, or none was measured; take the last"
            )
        return AdapterSoup.load(folder / "soup.safetensors"), read_tensors(
            folder / "weights.safetensors"
        )["weights"]

    def row_of(self, client: str, weights: Tensor) -> Tensor:
        """A client's row of π. Raises ``RunError`` for a client that the run does not have."""
        names = self.client_names
        if client not in names:
            raise RunError(f"{self.path} has no client {client!r}; it has {', '.join(names)}")
        return weights[names.index(client)]

    def round(self, *, best: bool = False) -> int:
        """After how many rounds the last or the best state was kept."""
        return int(self._best["after_round"]) if best and self._best else len(self.records)

    def scores(self, *, best: bool = False) -> dict[str, dict[str, float]]:
        """Each client's scores of the last or the best state, such as ``test_accuracy``; empty where it was not measured."""
        if best:
            found = self._best["served"] if self._best else None
        else:
            found = (
                self.summary["final"]["served"] if (self.path / "summary.json").is_file() else None
            )
        return dict(found["clients"]) if found else {}

    @property
    def task(self) -> dict[str, Any]:
        """What the run's data told about the task: ``labels``, names in the order of their ids, and the ``format`` of texts or None."""
        path = self.path / "task.json"
        if not path.is_file():
            raise RunError(
                f"{path} is missing, so what the labels mean cannot be told; only a new fedmerge run writes it"
            )
        return dict(json.loads(path.read_text(encoding="utf-8")))

    @property
    def adapter_config(self) -> dict[str, Any]:
        """PEFT's configuration of the adapters."""
        return dict(json.loads((self.path / "adapter_config.json").read_text(encoding="utf-8")))

    @property
    def baselines(self) -> dict[str, Self]:
        """The runs of the recipe's baselines, by strategy."""
        paths = {
            baseline.name: self.baseline_path(baseline.name) for baseline in self.recipe.baselines
        }
        return {
            name: self.open(path)
            for name, path in paths.items()
            if (path / "recipe.yaml").is_file()
        }

    def baseline_path(self, strategy: str) -> Path:
        """Where a baseline's run directory is."""
        return self.path / "baselines" / strategy

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {self.recipe.strategy.name}, {len(self.records)} of {self.recipe.rounds} rounds)"

    @cached_property
    def _clients(self) -> list[dict[str, Any]]:
        return list(json.loads((self.path / "clients.json").read_text(encoding="utf-8")))

    @cached_property
    def _best(self) -> dict[str, Any] | None:
        path = self.path / "best" / "scores.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def round_of(path: Path) -> int:
    """The round of ``weights/round-00007.safetensors``."""
    return int(path.stem.removeprefix("round-"))


def parts(recipe: Recipe, path: Path) -> list[tuple[Recipe, Path]]:
    """What a run consists of, with the directories: the recipe itself, and each of its baselines as a recipe of its own."""
    others = [baseline for baseline in recipe.baselines if baseline.name != recipe.strategy.name]
    alone = [
        recipe.model_copy(update={"strategy": baseline, "baselines": []}) for baseline in others
    ]
    return [
        (recipe, path),
        *((each, RunDirectory(path).baseline_path(each.strategy.name)) for each in alone),
    ]


def _half_written(name: str) -> bool:
    """Whether a path in a run directory is that of a file that was being written when the run was interrupted."""
    return bool(_TEMPORARY.search(name)) and bool(_WRITTEN.fullmatch(_TEMPORARY.sub(r"\1", name)))
