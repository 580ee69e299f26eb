"""An adapter merged from a run's soup, ready to use: a client's own, or one to try."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fedmerge_peft.adapters.exact_merge import add_base_update, concat
from fedmerge_peft.adapters.peft_folder import write_adapter
from fedmerge_peft.adapters.soup import AdapterSoup
from fedmerge_peft.errors import RunError
from fedmerge_peft.models.pretrained import load_model, model_folder, quiet_transformers
from fedmerge_peft.runs.directory import RunDirectory
from fedmerge_peft.tasks.tokenization import (
    get_pad_token_id,
    load_pretrained,
    load_tokenizer,
    resolve_max_length,
    token_limit,
)
from fedmerge_peft.training.accelerator import choose_device

if TYPE_CHECKING:
    from fedmerge_peft.models.backbone import Backbone


class Kind(NamedTuple):
    """What transformers calls a task."""

    auto_model: str
    """The class that loads its models."""
    pipeline: str
    """Its pipeline, which is also the hub's name for it."""


KINDS = {
    "sequence-classification": Kind("AutoModelForSequenceClassification", "text-classification"),
    "causal-lm": Kind("AutoModelForCausalLM", "text-generation"),
    "image-classification": Kind("AutoModelForImageClassification", "image-classification"),
}


class _Head(NamedTuple):
    """As much of a task as loading its model needs."""

    auto_model: str
    labels: tuple[str, ...]
    pad_token_id: int | None


@dataclass(frozen=True)
class MergedAdapter:
    """θ = π Θ, one adapter of a run; ``run.client(name)`` and ``run.merge({...})`` make them.

    Raises ``RunError`` for runs of ``fedem``, whose clients have none.
    """

    run: RunDirectory
    name: str
    """The client's, or what it is mixed from."""
    soup: AdapterSoup
    weights: Tensor
    """π, ``(d,)``; sums to 1."""
    round: int
    """After how many rounds."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """What a client was measured at on its own examples, such as ``test_accuracy``; empty for mixtures, and where it was not measured."""

    def __post_init__(self) -> None:
        if self.run.recipe.strategy.name == "fedem":
            raise RunError(
                f"{self.run.path}: fedem mixes what its adapters predict, so a client has no single adapter. Load each row of run.soup.rows"
                " as run.soup.state_dict(row), and average their probabilities by run.weights.loc[client]"
            )

    @property
    def row(self) -> Tensor:
        """θ, ``(P,)`` float32."""
        return self.soup.merge(self.weights)

    def saved(self, *, exact: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors in PEFT's saved form, and PEFT's configuration; with what the backbone has gained.

        ``exact`` concatenates the soup's factors instead of averaging them: the exact average of updates, at r times the number of
        adapters in use. Raises ``ValueError`` where ``concat`` knows no exact merge.
        """
        config = self.run.adapter_config
        state, config = (
            concat(self.soup, self.weights, config)
            if exact
            else (self.soup.state_dict(self.row), config)
        )
        return add_base_update(state, config, self.soup.base) if self.soup.base else (state, config)

    def save(self, folder: Path | str, *, exact: bool = False) -> Path:
        """Write a folder that ``PeftModel.from_pretrained`` loads, made where it is missing.

        Raises:
            RunError: The folder cannot be written.
            ValueError: As ``saved``.
        """
        return write_adapter(Path(folder), *self.saved(exact=exact))

    def model(self, device: str = "auto") -> Any:
        """A ``PeftModel`` with this adapter on the run's backbone, in evaluation mode, by plain PEFT: as from an exported folder.

        Args:
            device: auto (a CUDA GPU where there is one, else the CPU), cpu, mps, cuda, or cuda:1.

        Raises:
            BackboneError: The model cannot be loaded.
            DeviceError: There is no such device.
            RunError: The run does not say what its labels mean (an older one).
        """
        with self._folder() as folder:
            return self._model(folder, choose_device(device))

    def pipeline(self, device: str = "auto", **options: Any) -> Any:
        """A transformers pipeline with this adapter: text-classification, text-generation or image-classification.

        Texts are cut to the run's ``task.max_length``; generation ends after its ``task.max_new_tokens``. Options go to
        ``transformers.pipeline`` and win over both. Raises as ``model``.
        """
        import transformers

        task = self.run.recipe.task
        with self._folder() as folder:
            model = self._model(folder, choose_device(device))
            if task.name == "image-classification":
                backbone = self.run.recipe.backbone
                source, revision = (
                    (backbone.tokenizer, None)
                    if backbone.tokenizer
                    else (folder, backbone.revision)
                )
                parts = {
                    "image_processor": load_pretrained(
                        transformers.AutoImageProcessor, source, backbone, revision, backend="pil"
                    )
                }
            else:
                tokenizer, config = load_tokenizer(self.run.recipe.backbone, folder)
                limit = resolve_max_length(task.max_length, token_limit(tokenizer, config))
                if limit is not None:
                    tokenizer.model_max_length = limit
                tokenizer.pad_token_id = get_pad_token_id(tokenizer)
                parts = {"tokenizer": tokenizer}
                if task.name == "causal-lm":
                    tokenizer.padding_side = "left"
                    options = {"max_new_tokens": task.max_new_tokens, **options}
                else:
                    options = {"truncation": True, **options}
            with quiet_transformers():
                return transformers.pipeline(
                    KINDS[task.name].pipeline,
                    model=model,
                    device=model.device,
                    **{**parts, **options},
                )

    @contextmanager
    def _folder(self) -> Iterator[str]:
        """Where the backbone is, while the block runs."""
        with TemporaryDirectory(prefix="fedmerge-") as scratch:
            yield model_folder(self.run.recipe.backbone.model, Path(scratch))

    def _model(self, folder: str, device: torch.device) -> Any:
        from peft import PeftModel

        recipe = self.run.recipe
        labels = tuple(self.run.task["labels"])
        pad = (
            get_pad_token_id(load_tokenizer(recipe.backbone, folder)[0])
            if recipe.task.name == "sequence-classification"
            else None
        )
        base, _ = load_model(
            recipe.backbone, _Head(KINDS[recipe.task.name].auto_model, labels, pad), folder, device
        )
        with TemporaryDirectory(prefix="fedmerge-") as adapter:
            return PeftModel.from_pretrained(
                base, self.save(adapter), torch_device=str(device)
            ).eval()

    def __repr__(self) -> str:
        weights = ", ".join(f"{weight:.2f}" for weight in self.weights.tolist())
        return f"MergedAdapter({self.name!r}, weights=[{weights}], after round {self.round})"


def client_adapter(run: RunDirectory, name: str, *, best: bool = False) -> MergedAdapter:
    """What a client is served with, from the last or the best round. Raises ``RunError`` where it has none."""
    soup, weights = run.state(best=best)
    row = run.row_of(name, weights)
    return MergedAdapter(
        run, name, soup, row, run.round(best=best), run.scores(best=best).get(name, {})
    )


def mixed_adapter(
    run: RunDirectory, shares: Mapping[str | int, float], *, best: bool = False
) -> MergedAdapter:
    """An adapter of any mixture of adapters, by number, and clients, by name; as ``api.Run.merge``."""
    soup, known = run.state(best=best)
    adapters = len(soup)
    parts = torch.tensor([float(share) for share in shares.values()])
    if not (
        bool(torch.isfinite(parts).all()) and bool((parts >= 0).all()) and float(parts.sum()) > 0
    ):
        raise RunError(f"{dict(shares)} is no mixture: give parts of at least 0, not all of them 0")
    if wrong := [key for key in shares if isinstance(key, int) and not 0 <= key < adapters]:
        raise RunError(f"{run.path} has no adapter {wrong[0]}; it has 0 to {adapters - 1}")
    rows = [
        torch.eye(adapters)[key] if isinstance(key, int) else run.row_of(key, known)
        for key in shares
    ]
    name = " + ".join(
        f"{float(part):.2g} {key}" for key, part in zip(shares, parts / parts.sum(), strict=True)
    )
    return MergedAdapter(
        run, name, soup, (parts / parts.sum()) @ torch.stack(rows), run.round(best=best)
    )


def fit(backbone: Backbone, soup: AdapterSoup, run: RunDirectory) -> None:
    """Give a model, as the run's recipe loads it, what the run's adapters rely on: frozen tensors that they share, and what it has gained.

    Raises:
        RunError: The adapters are not for this model.
    """
    shapes = [
        {key: tuple(value.shape) for key, value in each.shared.items()} for each in (backbone, soup)
    ]
    if backbone.layout != soup.layout or shapes[0] != shapes[1]:
        raise RunError(
            f"{run.path}: its adapters do not fit {run.recipe.backbone.model} as it loads here; the model or PEFT has changed since the "
            "run (environment.json has its versions)"
        )
    backbone.load_shared(soup.shared)
    backbone.set_base(soup.base)
