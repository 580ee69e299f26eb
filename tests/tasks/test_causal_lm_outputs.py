"""Losses, predictions and generated text of causal language models."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import transformers as hf
from datasets import Dataset

from fedmerge_peft.errors import DataError, RecipeError
from tasks.causal_lm_tables import CHATS, NAME, PAIRS


# --- losses ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "table",
    [PAIRS, Dataset.from_dict({"text": ["A short one.", "And one that is quite a bit longer."]})],
)
def test_the_mean_loss_equals_transformers(task_of, tiny_models, kind, table):
    task = task_of(kind, table, name=NAME, metrics=["accuracy"])
    batch = task.collate(task.encode(table), np.arange(2))
    model = hf.AutoModelForCausalLM.from_pretrained(tiny_models / kind).eval()
    with torch.no_grad():
        output = model(**batch)
    losses, counts = task.losses(output.logits, batch["labels"])
    assert losses.shape == counts.shape == (2,)
    torch.testing.assert_close(losses.sum() / counts.sum(), output.loss)
    assert float(counts.sum()) == task.count_terms(batch["labels"])
    predicted, expected = task.predict(output.logits, batch["labels"])["tokens"]
    assert expected == batch["labels"][:, 1:][batch["labels"][:, 1:] != -100].tolist()
    assert len(predicted) == len(expected)


def test_losses_do_not_depend_on_the_batch(task_of, tiny_models):
    task = task_of("gpt2", PAIRS, name=NAME)
    examples = task.encode(PAIRS)
    model = hf.AutoModelForCausalLM.from_pretrained(tiny_models / "gpt2").eval()

    def losses(rows: list[int]) -> torch.Tensor:
        batch = task.collate(examples, np.array(rows))
        with torch.no_grad():
            return task.losses(model(**batch).logits, batch["labels"])[0]

    torch.testing.assert_close(losses([0, 1]), torch.cat([losses([0]), losses([1])]))


def test_tokens_are_predicted_only_for_metrics_that_use_them(task_of):
    task = task_of("llama", PAIRS, name=NAME, metrics=["perplexity"])
    assert not task.predict(torch.zeros(1, 3, 5), torch.tensor([[-100, 1, 2]]))


# --- generation -----------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_batch_generates_the_text_of_each_row_alone(task_of, tiny_models, kind, recwarn, caplog):
    table = Dataset.from_dict(
        {
            "prompt": ["Two", "Name a colour of the rainbow and", "x"],
            "completion": [" five ", " rot, grün", ""],
        }
    )
    task = task_of(kind, table, name=NAME, metrics=["exact_match"], max_new_tokens=8)
    assert task.generates
    model = hf.AutoModelForCausalLM.from_pretrained(tiny_models / kind).eval()
    model.generation_config.update(
        do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=1.3
    )
    examples = task.encode(table)
    device = torch.device("cpu")
    with caplog.at_level(logging.WARNING):
        together, wanted = task.generate(model, examples, np.arange(3), device)
    assert wanted == ["five", "rot, grün", ""]
    assert together == [
        task.generate(model, examples, np.array([row]), device)[0][0] for row in range(3)
    ]
    assert any(together)
    assert not caplog.records
    assert not recwarn.list


def test_generation_is_greedy_and_stops_at_the_end_of_sequence(task_of, tiny_models):
    task = task_of("llama", PAIRS, name=NAME, metrics=["exact_match"], max_new_tokens=5)
    model = hf.AutoModelForCausalLM.from_pretrained(tiny_models / "llama").eval()
    examples = task.encode(PAIRS)
    ids = examples.columns["prompt"][0].tolist()
    start = len(ids)
    with torch.no_grad():
        for _ in range(5):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    model.generation_config.update(do_sample=True, temperature=0.6, repetition_penalty=50.0)
    generated, _ = task.generate(model, examples, np.array([0]), torch.device("cpu"))
    assert generated == [task.processor.decode(ids[start:], skip_special_tokens=True).strip()]
    model.generation_config.eos_token_id = [3, ids[start + 2]]
    generated, _ = task.generate(model, examples, np.array([0]), torch.device("cpu"))
    stop = ids.index(ids[start + 2], start)
    assert generated == [
        task.processor.decode(ids[start : stop + 1], skip_special_tokens=True).strip()
    ]


def test_chats_generate_their_last_message(task_of, tiny_models):
    task = task_of("llama", CHATS, name=NAME, metrics=["rougeL"], max_new_tokens=4)
    examples = task.encode(CHATS)
    assert task.processor.decode(examples.columns["prompt"][0]) == "<s>[user] Hello</s>[assistant] "
    model = hf.AutoModelForCausalLM.from_pretrained(tiny_models / "llama").eval()
    assert task.generate(model, examples, np.array([1, 0]), torch.device("cpu"))[1] == [
        "Me",
        "Good day",
    ]


def test_a_chat_that_ends_with_the_user_cannot_be_generated(task_of):
    chat = [*CHATS[0]["messages"], {"role": "user", "content": "Hello"}]
    table = Dataset.from_dict({"messages": [chat]})
    task = task_of("llama", table, name=NAME, metrics=["rougeL"])
    with pytest.raises(
        DataError,
        match=r"row 0 \(from 0, .*\): the last message has the role user",
    ):
        task.encode(table)


def test_prompts_leave_room_to_generate(task_of):
    table = Dataset.from_dict({"prompt": ["word " * 100], "completion": [" end"]})
    task = task_of("llama", table, name=NAME, metrics=["rougeL"], max_new_tokens=100)
    prompt = task.encode(table).columns["prompt"][0]
    assert len(prompt) == 28
    assert prompt[0] == task.processor.bos_token_id


def test_plain_text_has_nothing_to_generate(task_of):
    with pytest.raises(
        RecipeError, match=r"task.metrics: exact_match compares generated completions"
    ):
        task_of(
            "llama",
            Dataset.from_dict({"text": ["a"]}),
            name=NAME,
            metrics=["perplexity", "exact_match"],
        )


def test_other_tasks_do_not_generate(task_of):
    task = task_of(
        "bert", Dataset.from_dict({"text": ["a"], "label": [0]}), name="sequence-classification"
    )
    with pytest.raises(TypeError, match="does not generate"):
        task.generate(None, None, np.arange(1), torch.device("cpu"))
