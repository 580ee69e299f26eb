"""Encoding of texts, prompts and chats for causal language models."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from datasets import Dataset

from fedmerge_peft.errors import DataError
from fedmerge_peft.tasks.cuts import warn_of_cuts
from fedmerge_peft.tasks.text_formats import fill_template, parse_template
from tasks.causal_lm_tables import CHATS, NAME, PAIRS


def decoded(task, examples, row) -> tuple[str, str]:
    """Decode an example, and its part with labels."""
    ids, labels = examples.columns["input_ids"][row], examples.columns["labels"][row]
    return task.processor.decode(ids), task.processor.decode(labels[labels != -100])


# --- formats --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("columns", "format"),
    [
        (["text", "messages", "prompt", "completion"], "messages"),
        (["text", "prompt", "completion", "instruction", "output"], "prompt-completion"),
        (["text", "instruction", "output"], "instruction"),
        (["text", "prompt", "instruction"], "text"),
    ],
)
def test_the_format_follows_from_the_columns(task_of, columns, format):
    table = Dataset.from_dict({column: ["a"] for column in columns})
    assert task_of("llama", table, name=NAME).format == format


def test_columns_that_fit_no_format_are_listed(task_of):
    with pytest.raises(
        DataError,
        match=(
            r"the data have body, title, which match no format \(messages: messages; "
            r"prompt-completion"
        ),
    ):
        task_of("llama", Dataset.from_dict({"body": ["a"], "title": ["b"]}), name=NAME)


def test_a_format_without_its_column_is_refused(task_of):
    with pytest.raises(
        DataError, match=r"prompt-completion needs the column 'completion'; the data have prompt"
    ):
        task_of(
            "llama", Dataset.from_dict({"prompt": ["a"]}), name=NAME, format="prompt-completion"
        )


@pytest.mark.parametrize(
    ("kind", "whole"), [("llama", "<s>One two.</s>"), ("gpt2", "One two.<|endoftext|>")]
)
def test_text_is_learned_whole_and_ends(task_of, kind, whole):
    table = Dataset.from_dict({"text": ["One two."]})
    task = task_of(kind, table, name=NAME)
    examples = task.encode(table)
    everything, learned = decoded(task, examples, 0)
    assert everything == whole
    assert whole.endswith(learned)
    assert (examples.columns["labels"][0] != -100).sum() == len(examples.columns["labels"][0]) - 1


@pytest.mark.parametrize(
    ("kind", "start", "end"), [("llama", "<s>", "</s>"), ("gpt2", "", "<|endoftext|>")]
)
def test_only_the_completion_is_learned(task_of, kind, start, end):
    task = task_of(kind, PAIRS, name=NAME)
    examples = task.encode(PAIRS)
    assert decoded(task, examples, 0) == (f"{start}Two and three? five{end}", f" five{end}")


def test_messages_are_laid_out_by_the_chat_template(task_of):
    task = task_of("llama", CHATS, name=NAME)
    examples = task.encode(CHATS)
    assert (
        decoded(task, examples, 1)[0] == "<s>[system] Be kind</s>[user] Who?</s>[assistant] Me</s>"
    )
    wanted = task.processor.apply_chat_template(CHATS[1]["messages"])["input_ids"]
    assert examples.columns["input_ids"][1].tolist() == wanted
    assert decoded(task, examples, 1)[1] == "Me</s>"


def test_messages_without_a_chat_template_are_refused_with_the_fix(task_of):
    with pytest.raises(
        DataError, match=r"needs a tokenizer with a chat template.*backbone.tokenizer"
    ):
        task_of("gpt2", CHATS, name=NAME).encode(CHATS)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            [[], [{"role": "user", "content": "a"}]],
            (
                r"row 0 \(from 0, .*\): 'messages' must be a list of at least one "
                r"\{role, content\}"
            ),
        ),
        (
            [[{"role": "user", "content": None}]],
            r"row 0 \(from 0, .*\): a message in 'messages' needs a role and a content",
        ),
        (
            [[{"role": "user"}]],
            r"row 0 \(from 0, .*\): a message in 'messages' needs a role and a content",
        ),
        (
            [[{"role": "assistant", "content": "a", "weight": 0}]],
            "a message in 'messages' has the weight 0, but only the weight 1 is supported",
        ),
        (["hello"], r"row 0 \(from 0, of the rows that the run uses\): 'messages' must be a list"),
        (
            [None, [{"role": "user", "content": "a"}]],
            r"row 0 \(from 0, of the rows that the run uses\): 'messages' must be a list",
        ),
    ],
)
def test_invalid_messages_are_refused(task_of, messages, message):
    table = Dataset.from_dict({"messages": messages})
    with pytest.raises(DataError, match=message):
        task_of("llama", table, name=NAME).encode(table)


def test_errors_of_the_chat_template_are_refused_with_their_row(task_of):
    task = task_of("llama", CHATS, name=NAME)
    task.processor.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        DataError,
        match=(
            r"row 0 \(from 0, .*\): the chat template rejects the messages: "
            r"roles must alternate"
        ),
    ):
        task.encode(CHATS)


# --- the template ---------------------------------------------------------------------------------
def test_the_default_template_leaves_out_an_empty_or_absent_input(task_of):
    table = Dataset.from_dict(
        {"instruction": ["Add.", "Say hi."], "input": ["2 {3}", ""], "output": ["5", "hi"]}
    )
    task = task_of("llama", table, name=NAME)
    short = "<s>### Instruction:\nSay hi.\n\n### Response:\n"
    examples = task.encode(table)
    assert decoded(task, examples, 0) == (
        "<s>### Instruction:\nAdd.\n\n### Input:\n2 {3}\n\n### Response:\n5</s>",
        "5</s>",
    )
    assert decoded(task, examples, 1) == (short + "hi</s>", "hi</s>")
    assert decoded(task, task.encode(table.remove_columns("input")), 1)[0] == short + "hi</s>"
    nulls = table.remove_columns("input").add_column("input", ["a", None])
    assert decoded(task, task.encode(nulls), 1)[0] == short + "hi</s>"


def test_a_template_may_name_any_column(task_of):
    table = Dataset.from_dict({"task": ["Translate"], "n": [3], "output": ["x"]})
    task = task_of("llama", table, name=NAME, format="instruction", template="{task} {{{n}}}: ")
    assert decoded(task, task.encode(table), 0)[0] == "<s>Translate {3}: x</s>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{instruction} {topic}",
            r"task.template: there is no column for \{topic\}; the data have instruction, output",
        ),
        ("{instruction.upper}", r"task.template: there is no column for \{instruction.upper\}"),
        ("{}", r"task.template: there is no column for \{\}"),
        ("{instruction", r"task.template: .*write \{\{ and \}\} for literal braces"),
    ],
)
def test_invalid_templates_are_refused(task_of, template, message):
    table = Dataset.from_dict({"instruction": ["a"], "output": ["b"]})
    with pytest.raises(DataError, match=message):
        task_of("llama", table, name=NAME, template=template).encode(table)


def test_only_paragraphs_with_one_empty_field_are_left_out():
    template = parse_template("A {x}\n\nB {y}\n\nC {x} {y}\n\nD")
    assert fill_template(template, {"x": "1", "y": " "}) == "A 1\n\nC 1  \n\nD"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"prompt": ["a", None], "completion": ["b", "c"]},
            r"row 1 \(from 0, of the rows that the run uses\): column 'prompt' is empty \(null\)",
        ),
        (
            {"prompt": ["a", "b"], "completion": [1.5, 2]},
            r"task.completion: column 'completion' has the type double, .* and is not text",
        ),
        (
            {"text": ["a", None]},
            r"row 1 \(from 0, of the rows that the run uses\): column 'text' is empty \(null\)",
        ),
        (
            {"instruction": [None, "a"], "output": ["b", "c"]},
            r"row 0 \(from 0, .*\): column 'instruction' is empty \(null\)",
        ),
    ],
)
def test_unsuitable_columns_are_refused(task_of, columns, message):
    table = Dataset.from_dict(columns)
    with pytest.raises(DataError, match=message):
        task_of("llama", table, name=NAME).encode(table)


@pytest.mark.parametrize(
    ("answers", "texts"), [([42, -1], ["42", "-1"]), ([True, False], ["true", "false"])]
)
def test_integers_and_booleans_are_read_as_the_file_has_them(task_of, caplog, answers, texts):
    rows = {"prompt": ["a", "b"], "completion": answers}
    read = [
        task.encode(table).columns["input_ids"]
        for column in (answers, texts)
        for table in [Dataset.from_dict(rows | {"completion": column})]
        for task in [task_of("llama", table, name=NAME)]
    ]
    assert [ids.tolist() for ids in read[0]] == [ids.tolist() for ids in read[1]]
    assert "and is read as text" in caplog.text


# --- tokens ---------------------------------------------------------------------------------------
def test_a_prompt_whose_tokens_merge_with_the_completion_is_tokenized_apart_and_counted(
    task_of, caplog
):
    table = Dataset.from_dict({"prompt": ["th", "fine:"], "completion": ["e", " yes"]})
    task = task_of("llama", table, name=NAME)
    with caplog.at_level(logging.WARNING):
        examples = task.encode(table)
    assert (
        "in 1 of 2 rows the prompt's tokens are not a prefix of the tokens of prompt + "
        "completion (first: row 0, from 0)" in caplog.text
    )
    assert decoded(task, examples, 0) == ("<s>the</s>", "e</s>")


@pytest.mark.parametrize(
    ("kind", "start", "end"), [("llama", "<s>", "</s>"), ("gpt2", "<|endoftext|>", "<|endoftext|>")]
)
def test_an_empty_prompt_is_the_begin_of_sequence_token(task_of, caplog, kind, start, end):
    table = Dataset.from_dict({"prompt": [""], "completion": ["yes"]})
    task = task_of(kind, table, name=NAME)
    with caplog.at_level(logging.WARNING):
        examples = task.encode(table)
    assert decoded(task, examples, 0) == (f"{start}yes{end}", f"yes{end}")
    assert not caplog.records


def test_a_long_prompt_is_truncated_on_the_left_so_that_the_completion_survives(task_of, caplog):
    table = Dataset.from_dict(
        {"prompt": ["x " * 200 + "end", "short"], "completion": [" done", " ok"]}
    )
    task = task_of("llama", table, name=NAME, max_length=20)
    with caplog.at_level(logging.WARNING):
        examples = task.encode(table)
        warn_of_cuts(examples, {"training": np.array([0]), "test": np.array([1])})
    whole, learned = decoded(task, examples, 0)
    assert len(examples.columns["input_ids"][0]) == 20
    assert learned == " done</s>"
    assert whole.startswith("<s>")
    assert whole.endswith("x end done</s>")
    assert caplog.messages == [
        "1 of 2 examples are longer than 20 tokens and were truncated "
        "(1 of 1 training, 0 of 1 test)"
    ]


def test_a_completion_that_fills_the_length_keeps_one_token_before_it(task_of):
    table = Dataset.from_dict({"prompt": ["start"], "completion": [" x" * 200]})
    examples = task_of("llama", table, name=NAME, max_length=10).encode(table)
    assert examples.cuts == {
        "are longer than 10 tokens and were truncated": [0],
        "were truncated to 10 tokens, and removed tokens have a loss": [0],
        "have no text to learn, only special tokens": [],
    }
    assert examples.columns["input_ids"][0][0] == 2
    assert (examples.columns["labels"][0] != -100).tolist() == [False] + [True] * 9


@pytest.mark.parametrize("columns", [["text"], ["prompt", "completion"]], ids=len)
def test_examples_without_a_text_to_learn_are_counted(columns, task_of):
    table = Dataset.from_dict({column: ["a", ""] for column in columns})
    cuts = task_of("llama", table, name=NAME).encode(table).cuts
    assert cuts["have no text to learn, only special tokens"] == [1]


@pytest.mark.parametrize("columns", [["text"], ["prompt", "completion"]], ids=len)
def test_a_cut_that_leaves_nothing_to_learn_names_the_length(columns, task_of):
    table = Dataset.from_dict({column: ["a b c d"] for column in columns})
    with pytest.raises(DataError, match=r"row 0 .*nothing to predict: .*raise task.max_length"):
        task_of("llama", table, name=NAME, max_length=1).encode(table)


def test_prompts_that_are_cut_to_leave_room_for_a_generated_text_are_counted(task_of):
    table = Dataset.from_dict({"prompt": ["a " * 100, "b"], "completion": ["c", "d"]})
    task = task_of("llama", table, name=NAME, max_new_tokens=100, metrics=["exact_match"])
    wanted = {"have a prompt of more than 28 tokens, cut on the left for generation": [0]}
    assert wanted.items() <= task.encode(table).cuts.items()
    assert task.encode_prompts(table["prompt"][:]).cuts == wanted


def test_a_long_text_is_truncated_on_the_right(task_of):
    table = Dataset.from_dict({"text": ["a b c d e f g h i j k l m n o p"]})
    task = task_of("llama", table, name=NAME, max_length=8)
    examples = task.encode(table)
    assert (
        examples.columns["input_ids"][0].tolist()
        == task.processor(table["text"][0])["input_ids"][:8]
    )


@pytest.mark.parametrize(
    ("kind", "columns", "options"),
    [
        ("gpt2", {"text": ["fine", ""]}, {}),
        ("llama", {"text": ["fine", "fine"]}, {"max_length": 1}),
        ("llama", {"prompt": ["fine"], "completion": ["fine"]}, {"max_length": 1}),
    ],
)
def test_a_row_that_leaves_nothing_to_predict_is_refused(task_of, kind, columns, options):
    table = Dataset.from_dict(columns)
    with pytest.raises(
        DataError,
        match=r"row \d \(from 0, .*\): with task.loss: \w+, 1 token leaves nothing to predict: '",
    ):
        task_of(kind, table, name=NAME, **options).encode(table)


def test_lengths_stay_within_the_model(task_of):
    with pytest.raises(DataError, match=r"task.max_length: 200 .* limit of 128"):
        task_of("gpt2", PAIRS, name=NAME, max_length=200)
    with pytest.raises(
        DataError,
        match=(
            r"task.max_new_tokens: 128 new tokens leave no room for a prompt; "
            r"the model's limit is 128"
        ),
    ):
        task_of("gpt2", PAIRS, name=NAME, max_new_tokens=128, metrics=["rougeL"])
