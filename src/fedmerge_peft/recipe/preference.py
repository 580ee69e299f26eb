"""Section of the task preference, and its metrics."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fedmerge_peft.plugins import METRICS, TASKS
from fedmerge_peft.recipe.registered import NameIn
from fedmerge_peft.recipe.tasks import CausalLMRecipe, CompletionRecipe, TaskRecipe
from fedmerge_peft.recipe.usual_columns import UsualColumns, named

RewardMetric = Annotated[str, NameIn(METRICS, of=frozenset({"rewards"}))]


class PreferenceRecipe(CompletionRecipe):
    """Preference optimization with pairs of a chosen and a rejected completion."""

    usual_columns: ClassVar[UsualColumns] = {
        key: named(key) for key in ("prompt", "chosen", "rejected")
    }

    prompt: str = "prompt"
    """Column with the prompt: a text, or a list of messages. Chats may lack this column; the prompt
    then consists of the messages with which both completions begin."""
    chosen: str = "chosen"
    """Column with the preferred completion: a text, or a list of messages."""
    rejected: str = "rejected"
    """Column with the other completion: a text, or a list of messages."""
    loss: Literal["dpo", "orpo"] = "dpo"
    """Loss of a pair. dpo: −log σ(reward of the chosen completion − reward of the rejected
    completion), with rewards relative to the backbone without an adapter. orpo: the language
    modeling loss of the chosen completion plus λ times the odds ratio loss; this loss needs no
    reference model."""
    beta: Annotated[float, Field(gt=0, le=100)] = 0.1
    """β of DPO: larger values keep the model closer to the backbone without an adapter. λ of ORPO:
    weight of the odds ratio loss."""
    metrics: Annotated[list[RewardMetric], Field(min_length=1)] = [
        "reward_accuracy",
        "reward_margin",
    ]
    """Metrics. Tables and log lines show the first. The reward of a completion is β times its
    log-probability relative to the backbone's; for orpo, λ times its mean log-probability per
    token."""

    @property
    def sequences(self) -> int:
        return 2  # a prompt with each of two completions

    def of_one_sequence(self) -> CausalLMRecipe:
        """Return the section of a causal language modeling task on a single completion."""
        own = self.model_dump(include={*CompletionRecipe.model_fields} - {"name"})
        return CausalLMRecipe(name="causal-lm", loss="completion", **own)

    def to_predict(self, format: str | None) -> TaskRecipe:
        """Return a section for the completion of prompts."""
        return self.of_one_sequence().to_predict(format)


TASKS.add("preference", "fedmerge_peft.tasks.preference:PreferenceTask", recipe=PreferenceRecipe)
