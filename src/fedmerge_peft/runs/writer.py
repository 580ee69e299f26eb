"""A run directory while it is written: what is known before the first round, every round, the end; and where an interrupted one goes on."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmerge_peft.errors import ResumeError, RunError
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.runs import checkpoint as checkpoints
from fedmerge_peft.runs.directory import RunDirectory, round_of
from fedmerge_peft.runs.environment import environment_of
from fedmerge_peft.runs.record import RoundRecord, Scores
from fedmerge_peft.strategies.base import Strategy
from fedmerge_peft.util.files import (
    atomically,
    link,
    write_json,
    write_tensors,
    write_text,
    writing,
)

if TYPE_CHECKING:
    from fedmerge_peft.engines.base import Engine


class RunWriter(RunDirectory):
    """A run to which rounds are being added, by one process (``files.held``)."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        super().__init__(path)
        self.__dict__["recipe"] = recipe
        self.completed = 0
        """Rounds on the disk."""

    @classmethod
    def create(cls, path: Path, recipe: Recipe, engine: Engine) -> RunWriter:
        """Make the directory and write down what is known before the first round. Raises ``RunExistsError``, ``RunError``."""
        cls.check_free(path)
        run = cls(path, recipe)
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
        run._describe(recipe, engine)
        return run

    @classmethod
    def reopen(cls, path: Path, recipe: Recipe, engine: Engine, strategy: Strategy) -> RunWriter:
        """Go back to the newest whole checkpoint, and undo on the disk what a run wrote after it.

        Args:
            path: Of a run that was interrupted, or is to have more rounds.
            recipe: The run's, possibly with other values of ``checkpoint.FREE``.
            engine: Loaded for it.
            strategy: Just made; brought to where it was.

        Raises:
            ResumeError: The run cannot go on; nothing was touched.
            RunError: The directory cannot be written. The run can still go on.
        """
        run = cls(path, recipe)
        documents = _documents(recipe, engine)
        for name in ("clients.json", "task.json"):
            if (path / name).is_file() and _read(path / name) != json.loads(
                json.dumps(documents[name], default=str)
            ):
                raise ResumeError(
                    f"{path} cannot go on: the data have changed, and {name} is not what they say now"
                )
        metrics = path / "metrics.jsonl"
        found = checkpoints.newest(
            path / "checkpoint", recipe, metrics.read_bytes() if metrics.exists() else b""
        )
        if found is not None:
            try:
                found.put_into(strategy)
            except ValueError as error:
                raise ResumeError(
                    f"{path} cannot go on: its checkpoint is of another adapter, or another version ({error})"
                ) from error
        run._go_back(found)
        run._describe(recipe, engine)
        if found is not None:
            write_tensors(path / "weights.safetensors", {"weights": strategy.weights})
        return run

    def append(self, record: RoundRecord, strategy: Strategy) -> None:
        """Write down a finished round. Raises ``RunError``.

        Soup and weights come first, so that no line of metrics speaks of what is not there; the checkpoint comes last.
        """
        with writing(self.path / "weights") as folder:
            folder.mkdir(exist_ok=True)
        write_tensors(
            self.path / "weights" / f"round-{record.round:05}.safetensors",
            {"weights": strategy.weights},
        )
        link(
            checkpoints.write_soup(self.path / "checkpoint", record.round, strategy.soup),
            self.path / "soup.safetensors",
        )
        write_tensors(self.path / "weights.safetensors", {"weights": strategy.weights})
        with writing(self.path / "metrics.jsonl") as path, path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record.to_dict(), ensure_ascii=False, default=float) + "\n")
            file.flush()
            os.fsync(file.fileno())
            position = file.tell()
        checkpoints.commit(self.path / "checkpoint", record.round, strategy, self.recipe, position)
        self.completed = record.round

    def offer_best(self, completed: int, scores: Scores, strategy: Strategy) -> None:
        """Keep soup and weights if their mean validation loss is the lowest so far; ``completed`` counts the rounds behind them."""
        loss = scores.validation_loss
        if (
            loss is None
            or not math.isfinite(loss)
            or (self._best is not None and loss >= self._best["served"]["validation_loss"])
        ):
            return
        with writing(self.path / "best") as folder:
            folder.mkdir(exist_ok=True)
        if 0 < completed == self.completed:
            link(self.path / "soup.safetensors", folder / "soup.safetensors")
        else:
            atomically(folder / "soup.safetensors", strategy.soup.save)
        write_tensors(folder / "weights.safetensors", {"weights": strategy.weights})
        self.__dict__["_best"] = {"after_round": completed, "served": vars(scores)}
        write_json(folder / "scores.json", self._best)

    def finish(self, final: Scores | None) -> None:
        """Write ``summary.json``."""
        records = self.records
        write_json(
            self.path / "summary.json",
            {
                "rounds": self.completed,
                "seconds": sum(record["seconds"] for record in records),
                "bytes_down": sum(record["bytes_down"] for record in records),
                "bytes_up": sum(record["bytes_up"] for record in records),
                "privacy": {"epsilon": records[-1]["epsilon"], "delta": self.recipe.privacy.delta}
                if records[-1].get("epsilon")
                else None,
                "failures": dict(
                    Counter(name for record in records for name in record.get("failures", ()))
                ),
                "final": {
                    "after_round": self.completed,
                    "served": vars(final) if final is not None else None,
                },
                "best": self._best,
                "warnings": records[-1]["warnings"],
            },
        )

    def _describe(self, recipe: Recipe, engine: Engine) -> None:
        """Write what is known before the first round; the recipe first, as it makes the directory a run's.

        What is there stays, but for the recipe, and for the environment, where each later start has an entry of its own.
        """
        write_text(self.path / "recipe.yaml", recipe.to_yaml())
        first, now = self.environment, environment_of(engine)
        resumed = [*first.get("resumed", []), {"after_round": self.completed, **now}]
        write_json(self.path / "environment.json", {**first, "resumed": resumed} if first else now)
        for name, document in _documents(recipe, engine).items():
            if not (self.path / name).is_file():
                write_json(self.path / name, document)

    def _go_back(self, found: checkpoints.Checkpoint | None) -> None:
        """Undo on the disk what was written after this checkpoint. Where this stops half-way, it can be done again."""
        self.completed = found.manifest.round if found is not None else 0
        gone = [
            path
            for path in (self.path / "weights").glob("round-*.safetensors")
            if round_of(path) > self.completed
        ]
        if found is None:
            gone += [self.path / "soup.safetensors", self.path / "weights.safetensors"]
        with writing(self.path):
            for path in [self.path / "summary.json", *gone]:
                path.unlink(missing_ok=True)
        metrics, folder = self.path / "metrics.jsonl", self.path / "checkpoint"
        if metrics.exists():
            with writing(metrics), metrics.open("r+b") as file:
                file.truncate(found.manifest.metrics if found is not None else 0)
                os.fsync(file.fileno())
        checkpoints.remove_all_but(folder, self.completed)
        if found is not None:
            link(found.path, self.path / "soup.safetensors")


def _documents(recipe: Recipe, engine: Engine) -> dict[str, Any]:
    """What a run says of its clients, its task and its adapter, by file."""
    config = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in engine.backbone.config.to_dict().items()
    }
    clients = [
        {
            "name": each.name,
            "group": each.group,
            "train": len(each.train),
            "validation": len(each.validation),
            "test": len(each.test),
        }
        for each in engine.clients
    ]
    documents: dict[str, Any] = {
        "clients.json": clients,
        "task.json": {
            "labels": list(engine.task.labels),
            "format": getattr(engine.task, "format", None),
        },
        "adapter_config.json": {
            **config,
            "base_model_name_or_path": recipe.backbone.model,
            "inference_mode": True,
        },
    }
    if (counts := engine.label_counts()) is not None:
        documents["labels.json"] = {"labels": list(engine.task.labels), "counts": counts}
    return documents


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: not readable ({error})") from error
