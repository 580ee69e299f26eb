"""Audio classification."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fedmerge_peft.errors import DataError
from fedmerge_peft.tasks.base import Batch, Examples, Padding
from fedmerge_peft.tasks.classification import PROBLEM_TYPE, Classification
from fedmerge_peft.tasks.inputs import reject_inputs
from fedmerge_peft.tasks.labels import blank_table
from fedmerge_peft.tasks.media import MediaTask, loading_code
from fedmerge_peft.tasks.row_names import row_name
from fedmerge_peft.tasks.sound import Samples, read_sounds
from fedmerge_peft.util.library_errors import library_errors

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.media_tasks import AudioClassificationRecipe as Section

_SECONDS = (0.4, 0.6, 0.6)
"""Lengths of the sounds of ``probe``, in seconds."""
_RANDOM = {"apply_spec_augment": False, "layerdrop": 0.0}
"""Configuration without SpecAugment and LayerDrop, which draw random numbers per batch."""


class AudioClassificationTask(Classification, MediaTask):
    """Classification of sounds, for example by word, speaker or kind of noise.

    The model's own feature extractor processes each sound once. Models train without SpecAugment
    and LayerDrop. For the arguments, see ``MediaTask``.
    """

    auto_model: ClassVar[str] = "AutoModelForAudioClassification"
    heads: ClassVar[tuple[str, ...]] = ("projector", "classifier")
    pipeline: ClassVar[str] = "audio-classification"
    paddings: ClassVar[tuple[Padding, ...]] = ("right", "none", "alone")
    medium: ClassVar[str] = "audio"
    auto_processor: ClassVar[str] = "AutoFeatureExtractor"
    pipeline_argument: ClassVar[str] = "feature_extractor"
    loading_code: ClassVar[str] = loading_code(
        auto_model, auto_processor, problem_type=PROBLEM_TYPE
    )

    @property
    def _input_name(self) -> str:
        return str(self.processor.model_input_names[0])

    @classmethod
    def probe_inputs(cls, recipe: Section) -> list[Any]:
        return [{"array": _noise(seed, 8000), "sampling_rate": None} for seed in (0, 1)]

    @classmethod
    def input_table(cls, recipe: Section, labels: list[str], inputs: list[Any]) -> Dataset:
        from datasets import List, Value

        unfit = [clip for clip in inputs if not isinstance(clip, str | Path | dict | np.ndarray)]
        reject_inputs(unfit, "the path of a WAV file, an array, or {array, sampling_rate}")
        column = {
            "path": Value("string"),
            "array": List(Value("float32")),
            "sampling_rate": Value("int64"),
        }
        rows = [[_as_row(clip)] for clip in inputs]
        return blank_table({recipe.audio: column}, rows, cls.blanks(recipe, labels))

    def match_inputs(self, model: Any) -> None:
        for name, value in _RANDOM.items():
            if hasattr(model.config, name):
                setattr(model.config, name, value)

    def probe(self) -> Examples:
        rate = self.processor.sampling_rate
        sounds = [_noise(seed, int(rate * size)) for seed, size in enumerate(_SECONDS)]
        inputs = [self._process(sound) for sound in sounds]
        return Examples({self._input_name: inputs, "labels": list(torch.zeros(3).long().unbind())})

    def encode(self, table: Dataset) -> Examples:
        """Decode all sounds, and run the feature extractor on each one separately.

        Sounds of more than ``max_seconds`` are cut at their end (``Examples.cuts``).

        Raises:
            DataError: The labels do not match the recipe; a sound is missing or too short, cannot
                be decoded or processed, or has another sampling rate than the model. The message
                about a sound names its row.
        """
        labels = self.targets(self.recipe, table, self.labels)
        rate = self.processor.sampling_rate
        longest = int(self.recipe.max_seconds * rate)
        inputs, cut = [], []
        for row, sound in enumerate(read_sounds(table, self.recipe.audio, rate)):
            if len(sound) > longest:
                cut.append(row)
            with library_errors(partial(self._fault, row)):
                inputs.append(self._process(sound[:longest]))
        return Examples(
            {self._input_name: inputs, "labels": list(labels.unbind())},
            {f"are longer than {self.recipe.max_seconds:g} seconds and were cut": cut},
        )

    def finish(self, model: Any, examples: Examples, device: torch.device) -> Examples:
        """Set ``positions`` to the lengths after the model's convolutions.

        Without raw samples as inputs, or if the model has no method for these lengths, return the
        examples unchanged. For the arguments, see ``Task.finish``.
        """
        count = getattr(model, "_get_feat_extract_output_lengths", None)
        if count is None or examples.columns[self._input_name][0].ndim > 1:
            return examples
        return replace(examples, positions=count(torch.from_numpy(examples.lengths)).numpy())

    def collate(self, examples: Examples, indices: NDArray[Any]) -> Batch:
        """Stack examples, padded with zeros.

        Returns:
            The feature extractor's output, float32: samples ``(batch, samples)``, or spectrograms
            such as ``(batch, frames, bins)``; if lengths differ, ``attention_mask`` over the second
            axis; and ``labels`` ``(batch,)``.
        """
        inputs = [examples.columns[self._input_name][index] for index in indices]
        labels = torch.stack([examples.columns["labels"][index] for index in indices])
        batch = {self._input_name: pad_sequence(inputs, batch_first=True), "labels": labels}
        lengths = torch.tensor([len(clip) for clip in inputs])
        if (lengths < lengths.max()).any():
            batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        return batch

    def _fault(self, row: int, reason: str) -> DataError:
        return DataError(
            f"{row_name(row)}: {type(self.processor).__name__} fails on the sound: {reason}"
        )

    def _process(self, sound: Samples) -> Tensor:
        """Run the feature extractor on one sound; return its output without the batch axis."""
        rate = self.processor.sampling_rate
        outputs = self.processor(sound, sampling_rate=rate, return_tensors="np")
        return torch.from_numpy(np.array(outputs[self._input_name][0])).float()


def _noise(seed: int, count: int) -> Samples:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, count).astype(np.float32)


def _as_row(value: Any) -> dict[str, Any]:
    """Return an input as ``{path, array, sampling_rate}``; a rate of None is the model's rate."""
    if isinstance(value, str | Path):
        return {"path": str(value), "array": None, "sampling_rate": None}
    if isinstance(value, np.ndarray):
        value = {"array": value, "sampling_rate": None}
    array = value.get("array", value.get("raw"))
    return {"path": None, "array": array, "sampling_rate": value.get("sampling_rate")}
