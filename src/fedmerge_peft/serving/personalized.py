"""A newcomer's adapter, and its comparison with alternatives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedmerge_peft.adapters.peft_folder import write_adapter
from fedmerge_peft.adapters.soup import AdapterSoup
from fedmerge_peft.runs.directory import RunDirectory
from fedmerge_peft.serving.generation_files import generation_writer
from fedmerge_peft.serving.model_card import adapter_card
from fedmerge_peft.util.files import write_text
from fedmerge_peft.util.folders import whole_folder

LEARNED = "learned weights"
"""Name of the method whose adapter is saved."""


@dataclass(frozen=True)
class Alternative:
    """Method to obtain an adapter for the newcomer, with its scores."""

    name: str
    detail: str
    """The adapter or client that was chosen, or the number of rounds; may be empty."""
    train_loss: float
    """Mean training loss (nats) of the adapter without the label prior."""
    test: Mapping[str, float]
    """Loss (nats) and metrics on the test examples, by name; empty without test examples."""
    seconds: float
    """Wall time to obtain the adapter, without its test. For the learned weights, it includes the
    evaluation of all fixed weights, because learning starts from the best of them."""


@dataclass(frozen=True)
class Personalized:
    """A newcomer's adapter, and the scores of the alternatives."""

    run: RunDirectory
    round: int
    """Number of completed rounds after which the soup was saved."""
    name: str
    soup: AdapterSoup
    logits: Tensor
    """w, ``(d,)`` float32."""
    methods: tuple[Alternative, ...]
    """Alternatives on the same examples, including this adapter under the name ``LEARNED``."""
    nearest: str
    """The federation's client with the most similar weights, by ½ ‖π − π'‖₁."""
    examples: Mapping[str, int]
    """Number of examples for training (``train``) and testing (``test``)."""
    config: Mapping[str, Any]
    """PEFT's configuration of the adapter."""
    prior: Tensor
    """The newcomer's label prior, to add to merged adapters, ``(P,)``; zero if there is none."""

    @property
    def weights(self) -> Tensor:
        """π = softmax(w), ``(d,)``."""
        return torch.softmax(self.logits, dim=0)

    @property
    def row(self) -> Tensor:
        """θ = π Θ plus the label prior, ``(P,)``."""
        return self.soup.merge(self.weights) + self.prior

    @property
    def scores(self) -> dict[str, float]:
        """Loss (nats) and metrics of this adapter on the test examples, such as ``test_loss``."""
        (learned,) = (method for method in self.methods if method.name == LEARNED)
        return {f"test_{metric}": value for metric, value in learned.test.items()}

    @property
    def adapter(self) -> dict[str, Tensor]:
        """The adapter as PEFT's state dict."""
        return self.soup.state_dict(self.row)

    def save(self, folder: Path | str) -> Path:
        """Write a new folder that ``PeftModel.from_pretrained`` loads, with a model card.

        The folder must be new or empty. Its ``weights.json`` contains the logits, π and the results
        of the methods.

        Raises:
            RunExistsError: The folder is not empty.
            RunError: The folder cannot be written.
            BackboneError: The tokenizer to write with the adapter cannot be loaded.
        """
        folder = Path(folder)
        RunDirectory.check_free(folder)
        write_generation = generation_writer(self.run)
        document = {
            "name": self.name,
            "examples": dict(self.examples),
            "logits": self.logits.tolist(),
            "weights": self.weights.tolist(),
            "nearest": self.nearest,
            "methods": [asdict(method) for method in self.methods],
        }
        with whole_folder(folder) as partial:
            write_adapter(partial, self.adapter, self.config, weights=document)
            write_generation(partial)
            card = adapter_card(
                self,
                repr(str(folder)),
                role="a newcomer to a federated fine-tuning run of {clients}",
                examples={"training": self.examples["train"], "test": self.examples["test"]},
                rank=self.config["r"],
                own="the newcomer's label prior" if bool(self.prior.any()) else None,
            )
            write_text(partial / "README.md", str(card))
        return folder
