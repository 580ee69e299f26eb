"""An adapter merged from a run's soup: a client's own, or any other mixture."""

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
from fedmerge_peft.adapters.peft_folder import highest_rank, write_adapter
from fedmerge_peft.adapters.soup import AdapterSoup
from fedmerge_peft.errors import RunError
from fedmerge_peft.models.placement import is_distributed
from fedmerge_peft.models.pretrained import load_model, model_folder
from fedmerge_peft.models.quiet import quiet_transformers
from fedmerge_peft.models.weights_digest import weights_digest
from fedmerge_peft.runs import documents
from fedmerge_peft.runs.confusion import client_confusion
from fedmerge_peft.runs.directory import RunDirectory
from fedmerge_peft.serving.generation_files import generation_writer
from fedmerge_peft.serving.model_card import adapter_card
from fedmerge_peft.tasks import task_type
from fedmerge_peft.tasks.generation import end_tokens, special_tokens
from fedmerge_peft.tasks.tokenization import get_pad_token_id, load_tokenizer
from fedmerge_peft.training.accelerator import choose_device
from fedmerge_peft.util.files import write_text
from fedmerge_peft.util.folders import whole_folder
from fedmerge_peft.util.text import shortened

if TYPE_CHECKING:
    import pandas as pd
    from huggingface_hub import ModelCard

    from fedmerge_peft.models.backbone import Backbone


_EXAMPLES = {"training": "train", "validation": "validation", "test": "test"}
"""Columns of ``run.clients``, by kind of example."""
_OWN_PARTS = "the own parts of the clients in the mixture"


class _ModelHead(NamedTuple):
    """Attributes of a task that are needed to load its model."""

    auto_model: str
    labels: tuple[str, ...]
    heads: tuple[str, ...]
    unused: tuple[str, ...]
    config_options: Mapping[str, Any]
    pad_token_id: int | None


@dataclass(frozen=True)
class MergedAdapter:
    """θ = π Θ plus own parts of clients, created by ``run.client(name)`` and ``run.merge({...})``.

    Raises:
        RunError: The clients of the run have no single adapter (``fedem``).
    """

    run: RunDirectory
    name: str
    """The client's name, or a description of the mixture."""
    soup: AdapterSoup
    weights: Tensor
    """π, ``(d,)``; sums to 1."""
    round: int
    """Number of completed rounds after which the soup was saved."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """A client's scores on its own examples, such as ``test_accuracy``; empty for mixtures, and if
    the run has no scores of the client in this state."""
    clients: Tensor | None = None
    """Share of each client in the mixture, ``(m,)``; one-hot for a single client.

    θ includes the clients' own parts, such as heads or label priors, in proportion to these shares.
    With ``strategy.blocks``, π differs by block, also in proportion to these shares. If None, θ
    includes no own parts, and ``weights`` applies to all blocks."""

    def __post_init__(self) -> None:
        if not self.run.recipe.strategy.single_adapter:
            raise RunError(
                f"{self.run.path}: {self.run.recipe.strategy.name} mixes the predictions of its "
                "adapters, so a client has no single adapter. In Python, load each row of "
                "run.soup.rows as run.soup.state_dict(row), and average their predictions with the "
                "weights run.weights.loc[client]"
            )

    @property
    def row(self) -> Tensor:
        """θ, ``(P,)`` float32."""
        return self.soup.merge(self.weights, self.clients)

    def confusion(self) -> pd.DataFrame:
        """Count the client's test examples (or words), true × predicted label.

        Raises ``RunError`` if the run has no such counts (``client_confusion``).
        """
        return client_confusion(self.run, self.name, self.round)

    def peft_state(self, *, exact: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return PEFT's state dict and configuration.

        They include the run's updates of the backbone (flora, fedex_lora), which raise the rank.

        Args:
            exact: Concatenate the soup's factors instead of averaging them. The result is the exact
                average of the products B A; ``concat`` states its rank.

        Raises:
            ValueError: ``exact`` is not possible for this kind of adapter (``concat``).
        """
        config = self.run.adapter_config
        state, config = (
            concat(self.soup, self.weights, config, self.clients)
            if exact
            else (self.soup.state_dict(self.row), config)
        )
        return add_base_update(state, config, self.soup.base) if self.soup.base else (state, config)

    def save(self, folder: Path | str, *, exact: bool = False) -> Path:
        """Write a folder that ``PeftModel.from_pretrained`` loads, with a model card.

        Args:
            folder: A new or empty folder. It is written whole or not at all.
            exact: As in ``peft_state``.

        Raises:
            RunExistsError: The folder is not empty.
            RunError: The folder cannot be written.
            BackboneError: The tokenizer to write with the adapter cannot be loaded.
            ValueError: As ``peft_state``.
        """
        folder, (state, config) = Path(folder), self.peft_state(exact=exact)
        RunDirectory.check_free(folder)
        write_generation = generation_writer(self.run)
        with whole_folder(folder) as partial:
            write_adapter(partial, state, config)
            write_generation(partial)
            card = self.card(repr(str(folder)), rank=highest_rank(config))
            write_text(partial / "README.md", str(card))
        return folder

    def card(self, place: str, base_model_id: str | None = None, *, rank: int) -> ModelCard:
        """Return the model card of the adapter, whose LoRA rank is ``rank`` (``adapter_card``)."""
        if self.name in self.run.client_names:
            role, own = "one of {clients} of a federated fine-tuning run", "the client's own part"
            row = self.run.clients.loc[self.name]
            examples = {part: int(row[column]) for part, column in _EXAMPLES.items()}
        else:
            role, own = "a mixture from a federated fine-tuning run of {clients}", _OWN_PARTS
            examples = {}
        has_clients = self.clients is not None and bool(self.clients.any())
        return adapter_card(
            self,
            place,
            base_model_id,
            role=role,
            examples=examples,
            rank=rank,
            own=own if self.soup.own is not None and has_clients else None,
        )

    def model(self, device: str = "auto") -> Any:
        """Load the run's backbone with this adapter as a ``PeftModel`` in evaluation mode.

        Args:
            device: auto (a CUDA GPU if there is one, else the CPU), cpu, mps, cuda, or cuda:1.

        Raises:
            BackboneError: The model cannot be loaded.
            DeviceError: There is no such device.
            RunError: The run's label names are missing.
        """
        with self._folder() as folder:
            return self._model(folder, choose_device(device))

    def pipeline(self, device: str = "auto", **options: Any) -> Any:
        """Return a transformers pipeline with this adapter.

        Its kind follows from the run's task, such as text-classification. Texts are truncated to
        the run's ``task.max_length``, except prompts of text generation. Text is generated with the
        settings of the recipe, and chats are formatted with its chat template and system prompt.

        Args:
            device: As in ``model``.
            options: Arguments for ``transformers.pipeline``; they override these defaults.

        Raises:
            RunError: The model is not a transformers model, or transformers has no pipeline for
                the task.
            FedMergeError: As ``model``.
        """
        import transformers

        recipe = self.run.recipe
        kind = task_type(recipe.task)
        if not kind.pipeline:
            raise RunError(
                f"pipeline: transformers {transformers.__version__} has no pipeline for "
                f"{recipe.task.name}; use run.predict or .model()"
            )
        with self._folder() as folder:
            model = self._model(folder, choose_device(device))
            if not isinstance(model.get_base_model(), transformers.PreTrainedModel):
                raise RunError(
                    "pipeline: transformers has no pipeline for "
                    f"{type(model.get_base_model()).__name__}, which a Python program passed; use "
                    "run.predict or .model()"
                )
            defaults = kind.pipeline_options(recipe.task, recipe.backbone, folder)
            if kind.completes:
                defaults["eos_token_id"] = end_tokens(defaults["tokenizer"], model) or None
                base = model.get_base_model()
                base.generation_config = special_tokens(base.generation_config)
            if not is_distributed(model):  # transformers refuses a device for several GPUs
                defaults["device"] = model.device
            with quiet_transformers():
                return transformers.pipeline(kind.pipeline, model=model, **{**defaults, **options})

    @contextmanager
    def _folder(self) -> Iterator[str]:
        """Yield the folder or hub id of the backbone."""
        with TemporaryDirectory(prefix="fedmerge-") as scratch:
            yield model_folder(self.run.trusted_recipe.backbone, Path(scratch))

    def _model(self, folder: str, device: torch.device) -> Any:
        from peft import PeftModel

        recipe = self.run.recipe
        kind, labels = task_type(recipe.task), tuple(self.run.task["labels"])
        pad = (
            get_pad_token_id(load_tokenizer(recipe.backbone, folder)[0])
            if kind.reads_last_token
            else None
        )
        head = _ModelHead(
            kind.auto_model, labels, kind.heads, kind.unused, kind.config_options, pad
        )
        base, missing = load_model(recipe.backbone, head, folder, device)
        check_weights(self.run, weights_digest(base, {*missing, *kind.unused}))
        with TemporaryDirectory(prefix="fedmerge-") as adapter:
            folder = str(write_adapter(Path(adapter), *self.peft_state()))
            with quiet_transformers():
                return PeftModel.from_pretrained(base, folder, torch_device=str(device)).eval()

    def __repr__(self) -> str:
        weights = ", ".join(f"{weight:.2f}" for weight in self.weights.tolist())
        return f"MergedAdapter({self.name!r}, weights=[{weights}], after round {self.round})"


def client_adapter(run: RunDirectory, name: str, *, best: bool = False) -> MergedAdapter:
    """Return a client's adapter in the state that the run serves or, with ``best``, the best state.

    Raises:
        RunError: The run has no such client, no such round, or no single adapter per client.
    """
    soup, weights = run.state(best=best)
    row = run.weights_of(name, weights)
    own = torch.eye(len(weights))[run.client_names.index(name)]
    return MergedAdapter(
        run, name, soup, row, run.round(best=best), run.scores(best=best).get(name, {}), own
    )


def mixed_adapter(
    run: RunDirectory, shares: Mapping[str | int, float], *, best: bool = False
) -> MergedAdapter:
    """Merge adapters of the soup and of clients in proportion to ``shares`` (``api.Run.merge``).

    Args:
        run: A run with at least one finished round.
        shares: Share of each adapter (by number) or client (by name); normalized to sum to 1.
        best: Use the round with the lowest validation loss, even if the run serves its last round.

    Raises:
        RunError: The shares are invalid; an adapter, client or round does not exist; ``shares``
            names an adapter by its number, although parts of the adapters are private to the
            clients; or the clients have no single adapter (``fedem``).
    """
    soup, known = run.state(best=best)
    adapters = len(soup)
    parts = torch.tensor([float(share) for share in shares.values()])
    if not (
        bool(torch.isfinite(parts).all()) and bool((parts >= 0).all()) and float(parts.sum()) > 0
    ):
        raise RunError(
            f"{shortened(str(dict(shares)), 200)} is not a valid mixture: give finite shares of at "
            "least 0, not all of them 0"
        )
    if unknown := [key for key in shares if isinstance(key, int) and not 0 <= key < adapters]:
        known_numbers = f"0 to {adapters - 1}" if adapters > 1 else "only adapter 0"
        raise RunError(f"{run.path} has no adapter {unknown[0]}; it has {known_numbers}")
    if soup.own is not None and soup.own.private and any(isinstance(key, int) for key in shares):
        raise RunError(
            f"{run.path}: parts of its adapters are private to the clients "
            f"({run.recipe.strategy.name}), so that the soup has no whole adapters; give shares "
            "of clients instead of adapter numbers"
        )
    rows = [
        torch.eye(adapters)[key] if isinstance(key, int) else run.weights_of(key, known)
        for key in shares
    ]
    owns = [
        torch.zeros(len(known))
        if isinstance(key, int)
        else torch.eye(len(known))[run.client_names.index(key)]
        for key in shares
    ]
    parts /= parts.sum()
    name = " + ".join(f"{float(part):.2g} {key}" for key, part in zip(shares, parts, strict=True))
    return MergedAdapter(
        run,
        name,
        soup,
        parts @ torch.stack(rows),
        run.round(best=best),
        clients=parts @ torch.stack(owns),
    )


def check_weights(run: RunDirectory, digest: str) -> None:
    """Raise ``RunError`` unless ``digest`` is that of the run's pretrained weights."""
    if documents.read(run.path / "backbone.json")["digest"] != digest:
        backbone = run.recipe.backbone
        raise RunError(
            f"{run.path}: the weights of {backbone.model} have changed since the run, so its "
            "adapters no longer fit; restore the weights (backbone.revision names a version on the "
            "hub), or run the recipe again"
        )


def load_shared_state(backbone: Backbone, soup: AdapterSoup, run: RunDirectory) -> None:
    """Load the tensors that all adapters of a run's soup share into a backbone.

    These are the frozen tensors ``soup.shared``, and the updates of the backbone's weights
    ``soup.base`` (flora, fedex_lora).

    Raises:
        RunError: The adapters do not fit this model, or its pretrained weights have changed.
    """
    check_weights(run, backbone.weights_digest)
    expected, shapes = (
        {key: tuple(value.shape) for key, value in shared.items()}
        for shared in (backbone.shared, soup.shared)
    )
    if backbone.layout != soup.layout or expected != shapes:
        raise RunError(
            f"{run.path}: its adapters do not fit {run.recipe.backbone.model} as loaded here; the "
            "model or PEFT has changed since the run. Restore the model, or install the versions "
            "that environment.json of the run lists"
        )
    backbone.load_shared(soup.shared)
    backbone.set_base(soup.base)
