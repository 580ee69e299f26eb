"""Write a run directory: metadata, rounds and the summary. Roll back an interrupted run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmerge_peft.distributed import rank_zero
from fedmerge_peft.errors import ResumeError, RunError
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.runs import checkpoint as checkpoints
from fedmerge_peft.runs import documents
from fedmerge_peft.runs.directory import RunDirectory, round_of
from fedmerge_peft.runs.environment import environment_of
from fedmerge_peft.runs.record import RoundRecord, Scores
from fedmerge_peft.strategies.base import Strategy
from fedmerge_peft.util import checked, strict_json
from fedmerge_peft.util.files import hardlink, translated_write_errors, write_atomically

if TYPE_CHECKING:
    from fedmerge_peft.engines.base import Engine


class RunWriter(RunDirectory):
    """Writer of one run, in a process that has locked the directory
    (``util.files.locked_directory``).

    On several ranks, every rank calls these methods. Only rank 0 writes, and its errors are raised
    on all ranks.
    """

    def __init__(self, path: Path, recipe: Recipe) -> None:
        super().__init__(path)
        self._given = recipe
        self.completed = 0
        """Number of completed rounds, on disk."""
        self._metrics_sum = ""
        """SHA-256 sum of the last line of ``metrics.jsonl``."""

    @property
    def recipe(self) -> Recipe:
        """The recipe passed to the writer; ``recipe.yaml`` may not exist yet."""
        return self._given

    @rank_zero
    def begin(self, engine: Engine, strategy: Strategy) -> None:
        """Create the directory of a new run, or roll an interrupted run back.

        A new directory gets the metadata. An interrupted run goes back to its latest valid
        checkpoint, or to its start if there is none. The output of later rounds is removed, except
        ``best/``.

        Args:
            engine: The engine loaded for the recipe.
            strategy: A new strategy. The checkpoint is restored into it on rank 0.

        Raises:
            RunExistsError: The directory contains other files; nothing was changed.
            ResumeError: The run cannot be resumed; nothing was changed.
            RunError: The directory cannot be written, or a document of the run is damaged. The run
                can be resumed when the cause is removed.
        """
        if (self.path / "recipe.yaml").is_file():
            self._reopen(engine, strategy)
        else:
            self.check_free(self.path)
            with translated_write_errors(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
            self._write_metadata(self.recipe, engine)

    def _reopen(self, engine: Engine, strategy: Strategy) -> None:
        path, recipe = self.path, self.recipe
        compared = ("clients.json", "task.json", "examples.json", "backbone.json")
        for name, document in metadata(recipe, engine).items():
            if name not in compared or not (path / name).is_file():
                continue
            if checked.read_document(path / name) != strict_json.loads(strict_json.dumps(document)):
                raise ResumeError(
                    f"{path} cannot be resumed: the data or the model have changed and no longer "
                    f"match {name}; restore them, or start a new run"
                )
        metrics = path / "metrics.jsonl"
        checkpoint = checkpoints.read_latest(
            path / "checkpoint", recipe, metrics.read_bytes() if metrics.exists() else b""
        )
        if checkpoint is not None:
            try:
                checkpoint.restore(strategy)
            except ValueError as error:
                raise ResumeError(
                    f"{path} cannot be resumed: its checkpoint belongs to another adapter or to "
                    f"another version of fedmerge-peft ({error}); start a new run"
                ) from error
        self._roll_back(checkpoint)
        self._write_metadata(recipe, engine)
        if checkpoint is not None:
            checked.write_tensors(path / "weights.safetensors", {"weights": strategy.weights})

    @rank_zero
    def write_decisions(self, document: Mapping[str, Any]) -> None:
        """Write ``decisions.json``, unless it exists or the document is empty."""
        path = self.path / "decisions.json"
        if document and not path.is_file():
            checked.write_document(path, document)

    @rank_zero
    def append(self, record: RoundRecord, strategy: Strategy) -> None:
        """Write a finished round. Raises ``RunError``.

        The soup and the weights are written before the line of ``metrics.jsonl``. The second file
        of the checkpoint, which completes the round, is written last.
        """
        with translated_write_errors(self.path / "weights") as folder:
            folder.mkdir(exist_ok=True)
        weights = self.path / "weights" / f"round-{record.round:05}.safetensors"
        checked.write_tensors(weights, {"weights": strategy.weights})
        hardlink(
            checkpoints.write_soup(self.path / "checkpoint", record.round, strategy.soup),
            self.path / "soup.safetensors",
        )
        hardlink(weights, self.path / "weights.safetensors")
        metrics = checked.append_record(
            self.path / "metrics.jsonl", record.to_dict(), self._metrics_sum
        )
        checkpoints.commit(self.path / "checkpoint", record.round, strategy, self.recipe, metrics)
        self._metrics_sum = metrics[1]
        self.completed = record.round

    @rank_zero
    def save_if_best(self, completed: int, scores: Scores, strategy: Strategy) -> None:
        """Save a state to ``best/`` if its ``scores.validation_loss`` is the lowest so far.

        Args:
            completed: Number of completed rounds in this state.
            scores: Scores of this state over all clients.
            strategy: The strategy in this state.
        """
        loss = scores.validation_loss
        if (
            loss is None
            or not math.isfinite(loss)
            or (self._best is not None and loss >= self._best["served"]["validation_loss"])
        ):
            return
        with translated_write_errors(self.path / "best") as folder:
            folder.mkdir(exist_ok=True)
        if 0 < completed == self.completed:
            hardlink(self.path / "soup.safetensors", folder / "soup.safetensors")
        else:
            strategy.soup.save(folder / "soup.safetensors")
        checked.write_tensors(folder / "weights.safetensors", {"weights": strategy.weights})
        self.__dict__["_best"] = {"after_round": completed, "served": vars(scores)}
        checked.write_document(
            folder / "scores.json", {"after_round": completed, "served": vars(scores)}
        )

    @rank_zero
    def write_confusion(self, confusion: Mapping[str, Sequence[Sequence[int]]] | None) -> None:
        """Write ``confusion.json`` after the last round.

        Args:
            confusion: Triples of true class, predicted class, and number of test examples or
                words, by client. If None, no file is written.
        """
        if confusion is None:
            return
        checked.write_document(
            self.path / "confusion.json",
            {"after_round": self.completed, "labels": self.task["labels"], "clients": confusion},
        )

    @rank_zero
    def finish(
        self,
        last_scores: Scores | None,
        privacy: Mapping[str, Any] | None = None,
        stopped: str | None = None,
    ) -> Scores | None:
        """Write ``summary.json``; with ``evaluation.serve: best``, serve the best round.

        To serve it, ``soup.safetensors`` and ``weights.safetensors`` become the files in ``best/``.
        If no best round was saved, the last round is served.

        Args:
            last_scores: Scores after the last round; None if no client has scores.
            privacy: ε, δ and source of the noise; None without differential privacy.
            stopped: Reason for an end before the planned rounds; None after all rounds.

        Returns:
            Scores of the state that is served; None if no client has scores.
        """
        records = self.records
        last = {
            "after_round": self.completed,
            "served": vars(last_scores) if last_scores is not None else None,
        }
        served, scores = last, last_scores
        if self.recipe.evaluation.serve == "best" and self._best is not None:
            served, scores = self._best, Scores(**self._best["served"])
            for name in ("soup.safetensors", "weights.safetensors"):
                hardlink(self.path / "best" / name, self.path / name)
        checked.write_document(
            self.path / "summary.json",
            {
                "rounds": self.completed,
                "stopped": stopped and {"reason": stopped, "planned": self.recipe.rounds},
                "seconds": sum(record["seconds"] for record in records),
                "bytes_down": sum(record["bytes_down"] for record in records),
                "bytes_up": sum(record["bytes_up"] for record in records),
                "privacy": privacy,
                "failures": dict(
                    Counter(name for record in records for name in record.get("failures", ()))
                ),
                "final": served,
                "last": last,
                "best": self._best,
                "warnings": records[-1]["warnings"],
            },
        )
        return scores

    @rank_zero
    def update_privacy(self, privacy: Mapping[str, Any]) -> None:
        """Replace the entry ``privacy`` of ``summary.json``.

        Called after each baseline, because its rounds add to the ε of the run's clients.
        """
        path = self.path / "summary.json"
        checked.write_document(path, {**documents.read(path), "privacy": privacy})

    def _write_metadata(self, recipe: Recipe, engine: Engine) -> None:
        """Write the documents that are known before the first round.

        The recipe is first, because it marks a run directory. On resume, it is replaced and the
        environment gets a ``resumed`` entry. Other documents are kept if they are readable.
        """
        checked.write_text(self.path / "recipe.yaml", recipe.to_yaml())
        first, current = self.environment, environment_of(engine)
        resumed = [*first.get("resumed", []), {"after_round": self.completed, **current}]
        environment = {**first, "resumed": resumed} if first else current
        checked.write_document(self.path / "environment.json", environment)
        for name, document in metadata(recipe, engine).items():
            if not _is_readable(self.path / name):
                checked.write_document(self.path / name, document)

    def _roll_back(self, checkpoint: checkpoints.Checkpoint | None) -> None:
        """Remove the output of rounds after a checkpoint; of all rounds if ``checkpoint`` is None.

        ``best/`` is kept. The removal can be repeated if it is interrupted.
        """
        self.completed = checkpoint.manifest.round if checkpoint is not None else 0
        stale = [
            path
            for path in (self.path / "weights").glob("round-*.safetensors")
            if round_of(path) > self.completed
        ]
        if checkpoint is None:
            stale += [self.path / "soup.safetensors", self.path / "weights.safetensors"]
        with translated_write_errors(self.path):
            for path in [self.path / "summary.json", self.path / "confusion.json", *stale]:
                path.unlink(missing_ok=True)
        # Checkpoints go first, so that metrics.jsonl has the rounds of all existing checkpoints.
        checkpoints.prune(self.path / "checkpoint", self.completed)
        self._truncate_metrics(checkpoint.manifest if checkpoint is not None else None)
        if checkpoint is not None:
            hardlink(checkpoint.path, self.path / "soup.safetensors")

    def _truncate_metrics(self, manifest: checkpoints.Manifest | None) -> None:
        """Keep the lines of ``metrics.jsonl`` up to a checkpoint; no line without a checkpoint.

        The file is replaced, so that hard links to the old file keep its content.
        """
        path = self.path / "metrics.jsonl"
        kept = manifest.metrics_bytes if manifest is not None else 0
        self._metrics_sum = manifest.metrics_sha256 if manifest is not None else ""
        if path.exists():
            content = path.read_bytes()[:kept]
            write_atomically(path, lambda temporary: _write_bytes(temporary, content))


def metadata(recipe: Recipe, engine: Engine) -> dict[str, Any]:
    """Return the documents of clients, task, backbone, adapter, examples and labels, by file name.

    ``examples.json`` is included only if the engine has a digest of the examples, and
    ``labels.json`` only if the engine counts labels.
    """
    config = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in engine.backbone.config.to_dict().items()
    }
    clients = [
        {
            "name": client.name,
            "group": client.group,
            "train": len(client.train),
            "validation": len(client.validation),
            "test": len(client.test),
        }
        for client in engine.clients
    ]
    documents: dict[str, Any] = {
        "clients.json": {"clients": clients},
        "task.json": {
            "labels": list(engine.task.labels),
            "format": engine.task.format,
            "padding": engine.task.padding,
        },
        "backbone.json": {"digest": engine.backbone.weights_digest},
        "adapter_config.json": {
            **config,
            "base_model_name_or_path": recipe.backbone.model,
            "inference_mode": True,
        },
    }
    digest = getattr(engine, "examples_digest", None)  # across sites, there is none
    if digest is not None:
        documents["examples.json"] = {"digest": digest}
    if (counts := engine.label_counts()) is not None:
        documents["labels.json"] = {"labels": list(engine.task.labels), "counts": counts}
    return documents


def _is_readable(path: Path) -> bool:
    """Return False for a document that is missing or damaged."""
    try:
        documents.read(path)
    except RunError:
        return False
    return True


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)
