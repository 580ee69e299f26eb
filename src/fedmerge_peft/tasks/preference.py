"""Preference optimization: of two completions of a prompt, one is preferred.

Direct preference optimization (DPO, arXiv 2305.18290, eq. 7) has a policy π_θ, a frozen reference
π_ref and β > 0. The reward of a completion y of the prompt x is

    r(y) = β (log π_θ(y | x) − log π_ref(y | x))

and the loss of an example is −log σ(r(chosen) − r(rejected)). The reference is the backbone without
an adapter. Its log-probabilities are computed once, before the first round.

ORPO (arXiv 2403.07691, eqs. 4 to 7) has no reference. With the mean over the |y| tokens

    l(y) = log π_θ(y | x) / |y|,    log odds(y) = l(y) − log(1 − exp l(y))

the loss is −l(chosen) − λ log σ(log odds(chosen) − log odds(rejected)). The reward is λ l(y).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedmerge_peft.data.columns import check_column
from fedmerge_peft.errors import BackboneError, DataError
from fedmerge_peft.tasks.base import Batch, Examples
from fedmerge_peft.tasks.causal_lm import CausalLMTask
from fedmerge_peft.tasks.chat_messages import have_messages, parse_messages
from fedmerge_peft.tasks.labels import reject_nulls
from fedmerge_peft.tasks.predictions import Compared
from fedmerge_peft.tasks.row_names import row_name
from fedmerge_peft.tasks.shown import ShownExample

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.backbone import BackboneRecipe
    from fedmerge_peft.recipe.preference import PreferenceRecipe

_PASS = 4
"""Number of examples in a forward pass of the reference."""
_SIDES = ("chosen", "rejected")


class PreferenceTask(CausalLMTask):
    """Preference pairs: a prompt with a chosen and a rejected completion, as texts or messages.

    A batch of n examples has 2n sequences. The two sequences of an example are adjacent.

    Args:
        recipe: Columns, lengths, loss, β (λ for ORPO) and metrics.
        backbone: Location of the tokenizer.
        table: All rows of the federation.
        model_folder: Local folder or hub id of the model.

    Raises:
        FedMergeError: See ``CausalLMTask``.
    """

    def __init__(
        self, recipe: PreferenceRecipe, backbone: BackboneRecipe, table: Dataset, model_folder: str
    ) -> None:
        causal = recipe.of_one_sequence()
        super().__init__(causal, backbone, _completions(recipe, table, "chosen"), model_folder)
        self._preference = recipe
        self.metrics = recipe.metrics

    @classmethod
    def check_table(cls, recipe: PreferenceRecipe, table: Dataset) -> None:  # type: ignore[override]
        for side in _SIDES:
            CausalLMTask.check_table(recipe.of_one_sequence(), _completions(recipe, table, side))

    @classmethod
    def format_in(cls, recipe: PreferenceRecipe, table: Dataset) -> str | None:  # type: ignore[override]
        return CausalLMTask.format_in(
            recipe.of_one_sequence(), _completions(recipe, table, "chosen")
        )

    def encode(self, table: Dataset) -> Examples:
        """Tokenize the prompt of every row with each of its two completions.

        Raises:
            DataError: See ``CausalLMTask.encode``; or there is no column of prompts, and the
                completions are texts, or the two chats of a row do not begin with the same messages
                and end with different ones.
        """
        sides = [
            super(PreferenceTask, self).encode(_completions(self._preference, table, side))
            for side in _SIDES
        ]
        columns = {
            f"{side}_{name}": tensors
            for side, examples in zip(_SIDES, sides, strict=True)
            for name, tensors in examples.columns.items()
        }
        predicates = dict.fromkeys(name for examples in sides for name in examples.cuts)
        cuts = {
            name: sorted({row for examples in sides for row in examples.cuts.get(name, ())})
            for name in predicates
        }
        pairs = zip(*(columns[f"{side}_labels"] for side in _SIDES), strict=True)
        equal = [row for row, pair in enumerate(pairs) if torch.equal(*pair)]
        cuts["have the same chosen and rejected completion, so there is no preference to learn"] = (
            equal
        )
        return Examples(columns, cuts)

    def show(self, table: Dataset) -> list[ShownExample]:
        chosen, rejected = (
            super(PreferenceTask, self).show(_completions(self._preference, table, side))
            for side in _SIDES
        )
        return [
            ShownExample(
                [
                    replace(segment, role=f"{side}: {segment.role}")
                    for side, example in zip(_SIDES, pair, strict=True)
                    for segment in example.segments
                ]
            )
            for pair in zip(chosen, rejected, strict=True)
        ]

    def collate(self, examples: Examples, indices: NDArray[Any]) -> Batch:
        """Pad and stack both sequences of each of n examples.

        Returns:
            ``input_ids`` and ``attention_mask``, ``(2n, longest)``, and ``labels``, ``(n, 2, 1 +
            longest)`` float32. The first label is the reference's log-probability (nats; 0 without
            a reference). The other labels are token ids, which float32 represents exactly; -100
            marks positions without a loss.
        """
        columns = examples.columns
        pairs = {
            name: [columns[f"{side}_{name}"][index] for index in indices for side in _SIDES]
            for name in ("input_ids", "labels")
        }
        flat = Examples(pairs)
        batch = super().collate(flat, np.arange(2 * len(indices)))
        ids = batch["labels"].float().view(len(indices), 2, -1)
        if (held := columns.get("reference_scores")) is None:
            reference = torch.zeros(len(indices), 2)
        else:
            reference = torch.stack([held[index] for index in indices])
        return {**batch, "labels": torch.cat([reference[..., None], ids], dim=-1)}

    def own_outputs(self, logits: Tensor, batch: Batch) -> list[Tensor]:
        own = super().own_outputs(logits, batch)
        return [torch.cat([*pair]) for pair in zip(own[::2], own[1::2], strict=True)]

    def probe(self) -> Examples:
        ids = super().probe().columns["input_ids"]
        columns = {"chosen": ids, "rejected": [ids[0], ids[2], ids[1]]}
        return Examples(
            {f"{side}_{name}": columns[side] for side in _SIDES for name in ("input_ids", "labels")}
            | {"prompt": ids}
        )

    @torch.no_grad()
    def finish(self, model: Any, examples: Examples, device: torch.device) -> Examples:
        """Add the reference's log-probabilities, ``(2,)`` per example, unless the loss is ORPO.

        The reference is the model with its adapter disabled.

        Raises:
            BackboneError: The outputs of the model depend on padding. The two sequences of an
                example need padding if their lengths differ.
        """
        if self.padding in ("none", "alone"):
            raise BackboneError(
                f"backbone.model: the outputs of {self._model} depend on padding, but this task "
                "runs two completions of different lengths in one pass; choose another model"
            )
        if self._preference.loss == "orpo":
            return examples
        model.eval()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        reference = torch.zeros(len(examples), 2)
        order = np.argsort(-examples.lengths, kind="stable")
        with model.disable_adapter():
            for start in range(0, len(order), _PASS):
                rows = order[start : start + _PASS]
                batch = {
                    name: tensor.to(device) for name, tensor in self.collate(examples, rows).items()
                }
                labels = batch.pop("labels")
                scores, _ = self._log_probabilities(self.forward(model, batch), labels)
                reference[torch.from_numpy(rows)] = scores.float().cpu()
        for parameter in model.parameters():  # PEFT makes the whole adapter trainable again
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        return replace(examples, columns={**examples.columns, "reference_scores": list(reference)})

    # ---- losses and rewards from logits ----------------------------------------------------------
    def losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the loss of each pair.

        Args:
            logits: ``(2n, length, vocabulary)``, or only those at the targets, as in
                ``CausalLMTask.losses``.
            labels: ``(n, 2, 1 + length)``, as in ``collate``.

        Returns:
            Losses in nats and ones, both float32 ``(n,)``.
        """
        if self._preference.loss == "dpo":
            chosen, rejected = self._rewards(logits, labels).unbind(dim=1)
            return -functional.logsigmoid(chosen - rejected), torch.ones_like(chosen)
        means = self._mean_log_probabilities(logits, labels)
        chosen, rejected = _log_odds(means).unbind(dim=1)
        preferred = functional.logsigmoid(chosen - rejected)
        return -means[:, 0] - self._preference.beta * preferred, torch.ones_like(chosen)

    def token_targets(self, labels: Tensor) -> Tensor:
        return super().token_targets(_token_ids(labels))

    def count_terms(self, labels: Tensor) -> int:
        return len(labels)

    def predict(self, logits: Tensor, labels: Tensor) -> Mapping[str, Compared]:
        """Return the rewards of both completions of each example, as ``rewards``."""
        chosen, rejected = self._rewards(logits, labels).unbind(dim=1)
        return {"rewards": (chosen.tolist(), rejected.tolist())}

    def _rewards(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the rewards of both completions of each example, ``(n, 2)``."""
        beta = self._preference.beta
        if self._preference.loss == "orpo":
            return beta * self._mean_log_probabilities(logits, labels)
        policy, _ = self._log_probabilities(logits, labels)
        return beta * (policy - labels[..., 0])

    def _mean_log_probabilities(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return l, the mean of log π over the completion's tokens, ``(n, 2)`` in nats."""
        sums, counts = self._log_probabilities(logits, labels)
        return sums / counts

    def _log_probabilities(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return log π(y | x) in nats and the number of tokens |y|, both ``(n, 2)``."""
        losses, counts = super().losses(logits, _token_ids(labels))
        return -losses.view(-1, 2), counts.view(-1, 2)


def _log_odds(means: Tensor) -> Tensor:
    """Return l − log(1 − exp l), with l limited to at most −ε, where ε is the machine epsilon."""
    below = means.clamp(max=-torch.finfo(means.dtype).eps)
    return below - torch.log(-torch.expm1(below))


def _token_ids(labels: Tensor) -> Tensor:
    """Return the labels of all sequences, ``(2n, length)``."""
    return labels[..., 1:].long().flatten(0, 1)


def _completions(recipe: PreferenceRecipe, table: Dataset, side: str) -> Dataset:
    """Return a table with the columns ``prompt`` and ``completion`` of one side.

    Without a column of prompts, the prompt of a row is the messages with which both chats begin.

    Args:
        recipe: Names of the columns.
        table: Rows.
        side: chosen or rejected.

    Raises:
        DataError: A column does not exist or has nulls; completions are texts, and there is no
            column of prompts; a chat is invalid; the two chats of a row begin with different
            messages, or one of them has no further messages.
    """
    columns = {"chosen": recipe.chosen, "rejected": recipe.rejected}
    for key, column in columns.items():
        check_column(table, column, f"task.{key}")
        reject_nulls(table.select_columns([column]).with_format("arrow")[:].column(column), column)
    own = columns[side]
    if recipe.prompt in table.column_names:
        have_messages(table, [recipe.prompt, own], f"task.{side}")
        both = table.select_columns([recipe.prompt, own])
        return both.rename_columns({recipe.prompt: "prompt", own: "completion"})
    if not hasattr(table.features[own], "feature"):
        raise DataError(
            f"task.prompt: there is no column {recipe.prompt!r}, which completions of plain text "
            "need; name the column with the prompts"
        )
    from datasets import Dataset

    rows: dict[str, list[Any]] = {"prompt": [], "completion": []}
    for row, pair in enumerate(zip(*(table[columns[key]] for key in _SIDES), strict=True)):
        chats = [
            parse_messages(chat, column, f"{row_name(row)}: ")
            for chat, column in zip(pair, columns.values(), strict=True)
        ]
        shared = _common(*chats)
        if not 0 < shared < min(map(len, chats)):
            raise DataError(
                f"{row_name(row)}: the chosen and the rejected chat must begin with "
                "the same messages and end with different ones; correct the row, or give the "
                "prompt in a column (task.prompt)"
            )
        chat = chats[_SIDES.index(side)]
        rows["prompt"].append(chat[:shared])
        rows["completion"].append(chat[shared:])
    return Dataset.from_dict(rows)


def _common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return the number of messages with which both chats begin."""
    pairs = enumerate(zip(first, second, strict=False))
    return next(
        (place for place, (one, other) in pairs if one != other), min(len(first), len(second))
    )
