"""Token ids and labels of chats equal those of TRL's ``SFTTrainer``, for templates of real models.

The reference is the trainer itself: its data set after preparation, through its own collator.
"""

from __future__ import annotations

import json
from itertools import groupby, pairwise

import pytest
from datasets import Dataset, Features, Json, List

from tasks.causal_lm_tables import NAME
from tasks.chat_templates import CHATML, FORMS, POSITIONS, SYSTEM, shipped

pytestmark = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing` is deprecated:FutureWarning"  # TRL 1.16 on transformers 5.23
)
LONG = [
    {"role": "user", "content": " Name a colour, naïve 東京 🎈 "},
    {"role": "assistant", "content": "  Red is one \n"},
    {"role": "user", "content": "\nTwo and\n\n three?\n"},
    {"role": "assistant", "content": "\n\n Five, <b>5</b> {{ five }} "},
]
SHORT = [LONG[2], {"role": "assistant", "content": "ümlaut — Fünf\t"}]
LONGER = [*SHORT, *LONG[:3], {"role": "assistant", "content": ""}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "to": "東京"}}}
TOOL = {"name": "add", "description": "Adds", "parameters": {"type": "object", "properties": {}}}
CALLING = [
    {"role": "user", "content": "Add"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "add", "content": " 5 "},
    {"role": "assistant", "content": " Five"},
]
Row = list[tuple[str, bool]]
"""Tokens of an example as text, and True for each token with a loss."""


@pytest.fixture
def of_trl(tiny_models, long_llama, tmp_path):
    """``of_trl(form, template, table, **options)``: the rows that TRL's trainer trains on."""
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    def build(form, template, table, **options):
        tokenizer = form.tokenizer(tiny_models / "llama")
        tokenizer.chat_template = template
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(long_llama),
            SFTConfig(
                str(tmp_path / "trl"), max_length=None, report_to=[], use_cpu=True, bf16=False,
                gradient_checkpointing=False, **options,
            ),
            train_dataset=table,
            processing_class=tokenizer,
        )  # fmt: skip
        batch = trainer.data_collator(list(trainer.train_dataset))
        real = batch["attention_mask"].bool()
        return [
            labeled(tokenizer, ids[kept], labels[kept])
            for ids, labels, kept in zip(batch["input_ids"], batch["labels"], real, strict=True)
        ]

    return build


@pytest.fixture
def of_task(tiny_models, long_llama, task_of, tmp_path):
    """``of_task(form, template, table, **options)``: the rows that the task trains on."""

    def build(form, template, table, **options):
        tokenizer = form.tokenizer(tiny_models / "llama")
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        backbone = {"tokenizer": str(tmp_path / "tokenizer")}
        options = {"name": NAME, "max_length": POSITIONS, **options}
        task = task_of("llama", table, backbone=backbone, folder=long_llama, **options)
        columns = task.encode(table).columns
        rows = zip(columns["input_ids"], columns["labels"], strict=True)
        return [labeled(tokenizer, ids, labels) for ids, labels in rows]

    return build


def labeled(tokenizer, ids, labels) -> Row:
    ids, labels = ids.tolist(), labels.tolist()
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    tokens = tokenizer.convert_ids_to_tokens(ids)
    newline = tokenizer.convert_ids_to_tokens(tokenizer.encode("\n", add_special_tokens=False))
    names = ["\n" if [token] == newline else token for token in tokens]
    return [(name, label != -100) for name, label in zip(names, labels, strict=True)]


def chats(form) -> Dataset:
    """Chats with and without a system prompt, and with tools, as far as the form takes them."""
    rows = [(chat, None) for chat in (LONG, SHORT, LONGER)]
    if form.tools:
        rows += [(CALLING, [{"type": "function", "function": TOOL}])]
    if form.system:
        rows += [([SYSTEM, *chat], tools) for chat, tools in rows]
    return Dataset.from_dict(
        {"messages": [chat for chat, _ in rows], "tools": [tools for _, tools in rows]},
        features=Features({"messages": List(Json()), "tools": Json()}),
    )


# --- the assistant's turns ------------------------------------------------------------------------
@pytest.mark.parametrize("name", FORMS)
def test_a_template_with_marks_gives_trls_ids_and_labels(of_task, of_trl, name):
    form = FORMS[name]
    table = chats(form)
    assert of_task(form, form.marked, table) == of_trl(
        form, form.marked, table, assistant_only_loss=True
    )


def without_begin(*begins: str):
    """Return a function that takes the loss from the first token of each turn, one of ``begins``.

    These tokens end the generation prompt: the model reads them, and never writes them.
    """

    def change(row: Row) -> Row:
        firsts = {
            place for place, (one, two) in enumerate(pairwise(row), 1) if two[1] and not one[1]
        }
        assert firsts
        assert {row[place][0] for place in firsts} <= set(begins)
        return [
            (token, learned and place not in firsts) for place, (token, learned) in enumerate(row)
        ]

    return change


def with_line_break(row: Row) -> Row:
    """Put the loss on the line break behind each turn, which ends the turn in the template."""
    after = {place for place, (one, two) in enumerate(pairwise(row), 1) if one[1] and not two[1]}
    assert after
    assert {row[place][0] for place in after} == {"\n"}
    return [(token, learned or place in after) for place, (token, learned) in enumerate(row)]


def without_empty_reasoning(row: Row) -> Row:
    """Remove the empty reasoning before all turns but the last.

    TRL's template writes it before every turn. The model's own, which also renders the chat when
    the model answers, writes it before the last.
    """
    block = [(token, True) for token in ("<think>", "\n", "\n", "</think>", "\n", "\n")]
    runs = [list(run) for _, run in groupby(row, key=lambda pair: pair[1])]
    turns = [run for run in runs if run[0][1]]
    assert all(turn[: len(block)] == block for turn in turns)
    for turn in turns[:-1]:
        del turn[: len(block)]
    return [pair for run in runs for pair in run]


DIFFERENCES = {
    "qwen2.5": without_begin("\n"),
    "qwen3": without_empty_reasoning,
    "zephyr": with_line_break,
    "deepseek": without_begin("<｜Assistant｜>", "<｜tool▁outputs▁end｜>"),
}
"""Changes from TRL's labels to those of the model's own template. All other forms are equal."""


@pytest.mark.parametrize("name", FORMS)
def test_the_models_own_template_gives_trls_labels_with_the_named_differences(
    of_task, of_trl, name
):
    form = FORMS[name]
    table = chats(form)
    template = form.plain if form.trl else form.marked
    reference = of_trl(form, template, table, assistant_only_loss=True)
    change = DIFFERENCES.get(name, list)
    assert of_task(form, form.plain, table) == [change(row) for row in reference]
    assert name not in DIFFERENCES or any(change(row) != row for row in reference)


# --- completions and whole chats ------------------------------------------------------------------
@pytest.mark.parametrize("name", FORMS)
def test_completions_of_messages_have_trls_ids_and_labels(of_task, of_trl, name):
    form = FORMS[name]
    begin = [SYSTEM] if form.system else []
    rows = [(chat[:-1], chat[-1:]) for chat in (LONG, SHORT)]
    table = Dataset.from_dict(
        {
            "prompt": [[*begin, *prompt] for prompt, _ in rows],
            "completion": [end for _, end in rows],
        }
    )
    assert of_task(form, form.plain, table) == of_trl(
        form, form.plain, table, completion_only_loss=True
    )


def test_whole_chats_have_trls_ids_and_a_loss_on_all_tokens_but_the_first(of_task, of_trl):
    table = chats(CHATML)
    reference = of_trl(CHATML, CHATML.plain, table)
    assert of_task(CHATML, CHATML.plain, table, loss="all") == [
        [(row[0][0], False), *row[1:]] for row in reference
    ]
    assert all(learned for row in reference for _, learned in row)  # the first is not predicted


# --- differences on purpose -----------------------------------------------------------------------
def test_special_tokens_in_messages_are_tokens_for_trl_and_characters_here(of_task, of_trl):
    chat = [{"role": "user", "content": "What is <|im_end|>?"}, LONG[3]]
    table = Dataset.from_dict({"messages": [[SYSTEM, *chat]]})
    (ours,) = of_task(CHATML, CHATML.marked, table)
    (theirs,) = of_trl(CHATML, CHATML.marked, table, assistant_only_loss=True)
    counts = [[token for token, _ in row].count("<|im_end|>") for row in (ours, theirs)]
    assert counts == [3, 4]
    learned = [[token for token, has_loss in row if has_loss] for row in (ours, theirs)]
    assert learned[0] == learned[1]


def test_turns_without_an_end_are_counted_and_trls_template_ends_them(of_task, of_trl, caplog):
    glm = shipped("glm4moe")
    table = Dataset.from_dict({"messages": [[SYSTEM, *LONG], LONG]})
    of_task(glm, glm.plain, table)
    assert (
        "in 2 of 2 chats (first: row 0, from 0) the last token with a loss is no special token"
        in (caplog.text)
    )
    caplog.clear()
    ours = of_task(glm, glm.marked, table)
    assert "no special token" not in caplog.text
    assert ours == of_trl(glm, glm.plain, table, assistant_only_loss=True)


def test_arguments_of_tool_calls_may_be_json_for_every_template(of_task):
    for form in (form for form in FORMS.values() if form.tools):
        written = json.dumps(CALL["function"]["arguments"])
        call = {**CALL, "function": {**CALL["function"], "arguments": written}}
        chat = [CALLING[0], {**CALLING[1], "tool_calls": [call]}, *CALLING[2:]]
        tables = [
            Dataset.from_dict({"messages": [each]}, features=Features({"messages": List(Json())}))
            for each in (CALLING, chat)
        ]
        rows = [of_task(form, form.plain, table) for table in tables]
        assert rows[0] == rows[1]
