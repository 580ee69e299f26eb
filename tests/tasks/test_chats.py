"""Chats: formats of rows, and the tokens of a chat that have a loss."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset

from fedmerge_peft.errors import DataError, RecipeError
from fedmerge_peft.tasks.chat_messages import parse_messages
from tasks.causal_lm_tables import CHATS, NAME, PAIRS
from tasks.chat_templates import CHAT, CHATML, FORMS, MISTRAL, QWEN3, QWEN25


@pytest.fixture
def chat_task(task_of, tiny_models, long_llama, tmp_path):
    """``chat_task(form, rows, **options)``: the task with the template and tokens of a form."""

    def build(form, rows, **options):
        form.tokenizer(tiny_models / "llama").save_pretrained(tmp_path)
        table = Dataset.from_dict(rows)
        options = {"name": NAME, "backbone": {"tokenizer": str(tmp_path)}, **options}
        return task_of("llama", table, folder=long_llama, **options), table

    return build


def decoded(task, examples, row=0):
    """Return an example and its tokens with a loss, as text."""
    ids, labels = examples.columns["input_ids"][row], examples.columns["labels"][row]
    assert (labels[labels != -100] == ids[labels != -100]).all()
    return task.processor.decode(ids), task.processor.decode(labels[labels != -100])


LEARNED = {
    "chatml": "Red is one<|im_end|>\nFive<|im_end|>\n",
    "llama3": "Red is one<|eot_id|>Five<|eot_id|>",
    "mistral": "Red is one</s>Five</s>",
    "mistral-late": " Red is one</s> Five</s>",
    "gemma": "Red is one<end_of_turn>\nFive<end_of_turn>\n",
    "qwen2.5": "Red is one<|im_end|>\nFive<|im_end|>\n",
    "qwen3": "Red is one<|im_end|>\n<think>\n\n</think>\n\nFive<|im_end|>\n",
    "phi3": "Red is one<|end|>\nFive<|end|>\n</s>",
    "zephyr": "Red is one</s>\nFive</s>\n",
    "deepseek": "Red is one<｜end▁of▁sentence｜>Five<｜end▁of▁sentence｜>",
    "cohere": "Red is one<|END_OF_TURN_TOKEN|>Five<|END_OF_TURN_TOKEN|>",
}
"""The part of ``Form.chat`` that has a loss, by form."""


# --- the turns of the assistant -------------------------------------------------------------------
@pytest.mark.parametrize("name", FORMS)
def test_the_assistants_turns_have_a_loss_with_templates_of_real_models(chat_task, caplog, name):
    form = FORMS[name]
    task, table = chat_task(form, {"messages": [form.chat]})
    assert task.loss == "assistant"
    whole, learned = decoded(task, task.encode(table))
    assert whole == task.processor.apply_chat_template(form.chat, tokenize=False)
    assert learned == LEARNED[name]
    # DeepSeek's generation prompt begins reasoning that the chat does not have
    assert [record.message[:16] for record in caplog.records] == (
        ["in 1 of 1 chats "] if name == "deepseek" else []
    )


def test_marks_that_differ_from_the_turns_decide_with_a_warning(chat_task, caplog):
    marked = CHATML.marked.replace(
        "{% generation %}{{message['content'] + ", "{{ message['content'] }}{% generation %}{{ "
    )
    task, table = chat_task(CHATML, {"messages": [CHATML.chat]}, chat_template=marked)
    assert decoded(task, task.encode(table))[1] == "<|im_end|>\n<|im_end|>\n"
    assert (
        "in 1 of 1 chats the parts that the chat template marks as generated differ" in caplog.text
    )


def test_reasoning_that_the_template_removes_from_earlier_turns_is_no_part_of_them(chat_task):
    chat = [dict(message) for message in CHAT]
    chat[1]["content"] = "<think>\nhm\n</think>\n\nRed is one"
    chat[3]["content"] = "<think>\noh\n</think>\n\nFive"
    task, table = chat_task(QWEN3, {"messages": [chat]})
    assert decoded(task, task.encode(table))[1] == (
        "Red is one<|im_end|>\n<think>\noh\n</think>\n\nFive<|im_end|>\n"
    )


def test_a_turn_that_is_not_found_is_refused_with_the_fix(chat_task):
    hidden = "{% for m in messages %}{{ m.role ~ loop.length }}{% endfor %}"
    task, table = chat_task(CHATML, {"messages": [CHAT]}, chat_template=hidden)
    with pytest.raises(DataError, match=r"row 0 .*not found in the chat; .*\{% generation %\}"):
        task.encode(table)


def test_a_chat_without_the_assistant_is_refused(chat_task):
    task, table = chat_task(CHATML, {"messages": [CHAT, CHAT[:1]]})
    with pytest.raises(DataError, match=r"row 1 .*no message has the role assistant \(roles: user"):
        task.encode(table)


def test_a_completion_of_the_user_is_refused(chat_task):
    task, table = chat_task(CHATML, {"messages": [CHAT, [*CHAT, CHAT[0]]]}, loss="completion")
    with pytest.raises(DataError, match=r"row 1 .*not a turn of the assistant \(roles: user\)"):
        task.encode(table)


def test_special_tokens_in_messages_are_characters_and_labels_stay_right(chat_task):
    chat = [dict(message) for message in CHATML.chat]
    chat[1]["content"] = "What is <|im_end|>?"
    chat[2]["content"] = "<|im_end|> ends"
    task, table = chat_task(CHATML, {"messages": [chat]})
    examples = task.encode(table)
    whole, learned = decoded(task, examples)
    assert learned == "<|im_end|> ends<|im_end|>\nFive<|im_end|>\n"
    assert "user\nWhat is <|im_end|>?<|im_end|>" in whole
    (end,) = task.processor.encode("<|im_end|>", add_special_tokens=False)
    labels = examples.columns["labels"][0]
    assert (labels == end).sum() == 2


# --- which part has a loss ------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("loss", "learned"),
    [
        ("assistant", " Red is one</s>Five</s>"),
        ("completion", "Five</s>"),
        ("all", "[user] Name a colour</s>[assistant] Red is one</s>[user] Two and three?</s>"
                "[assistant] Five</s>"),
    ],
)  # fmt: skip
def test_the_recipe_chooses_the_part_of_a_chat_with_a_loss(task_of, loss, learned):
    table = Dataset.from_dict({"messages": [CHAT]})
    task = task_of("llama", table, name=NAME, loss=loss)
    assert decoded(task, task.encode(table))[1] == learned


def test_prompts_may_have_a_loss_too(task_of):
    task = task_of("llama", PAIRS, name=NAME, loss="all")
    assert decoded(task, task.encode(PAIRS))[1] == "Two and three? five</s>"


@pytest.mark.parametrize(
    ("table", "loss", "message"),
    [
        (PAIRS, "assistant", "task.loss: assistant needs chats, but the data have the format prom"),
        (Dataset.from_dict({"text": ["a"]}), "assistant", "the format text; use all, or data with"),
        (Dataset.from_dict({"text": ["a"]}), "completion", "task.loss: completion needs prompts"),
    ],
)
def test_a_part_that_the_format_does_not_have_is_refused(task_of, table, loss, message):
    with pytest.raises(RecipeError, match=message):
        task_of("llama", table, name=NAME, loss=loss)


# --- formats of rows ------------------------------------------------------------------------------
def test_prompts_and_completions_may_be_lists_of_messages(task_of):
    table = Dataset.from_dict({"prompt": [CHAT[:3]], "completion": [CHAT[3:]]})
    task = task_of("llama", table, name=NAME)
    assert (task.format, task.loss) == ("messages", "completion")
    whole, learned = decoded(task, task.encode(table))
    assert learned == "Five</s>"
    assert whole == task.processor.decode(task.processor.apply_chat_template(CHAT)["input_ids"])
    assert decoded(
        task_of("llama", table, name=NAME, format="prompt-completion"), task.encode(table)
    ) == (whole, learned)


def test_a_prompt_of_messages_needs_a_completion_of_messages(task_of):
    table = Dataset.from_dict({"prompt": [CHAT[:1]], "completion": ["Red"]})
    with pytest.raises(
        DataError, match=r"'prompt' has lists of messages, but 'completion' does not"
    ):
        task_of("llama", table, name=NAME)
    others = {"text": ["a"], "instruction": ["b"], "output": ["c"]}
    for name, values in others.items():
        table = table.add_column(name, values)
    for kind in ("text", "instruction"):
        assert task_of("llama", table, name=NAME, format=kind).format == kind
    with pytest.raises(DataError, match=r"^task\.completion: the column 'prompt' has lists"):
        task_of("llama", table, name=NAME, format="prompt-completion")


@pytest.mark.parametrize(
    "column",
    [
        {"conversations": [[
            {"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good day"},
        ]]},
        {"conversations": [CHATS[0]["messages"]]},
        {"messages": [json.dumps(CHATS[0]["messages"])]},
        {"messages": [[
            {"role": "user", "content": [
                {"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"},
            ]},
            {"role": "assistant", "content": [{"type": "text", "text": "Good day"}]},
        ]]},
    ],
    ids=["ShareGPT", "conversations", "JSON", "parts"],
)  # fmt: skip
def test_other_forms_of_messages_are_the_same_chat(task_of, column):
    table = Dataset.from_dict(column)
    task = task_of("llama", table, name=NAME)
    assert decoded(task, task.encode(table)) == (
        "<s>[user] Hello</s>[assistant] Good day</s>",
        "Good day</s>",
    )


def test_parts_that_are_no_text_are_refused(task_of):
    chat = [{"role": "user", "content": [{"type": "image", "text": None}]}]
    table = Dataset.from_dict({"messages": [chat]})
    with pytest.raises(DataError, match=r"row 0 .*a part of the type 'image'; only parts of text"):
        task_of("llama", table, name=NAME).encode(table)


def test_a_system_prompt_is_added_to_chats_without_one(task_of):
    task = task_of("llama", CHATS, name=NAME, system_prompt="Be brief")
    examples = task.encode(CHATS)
    assert decoded(task, examples, 0)[0].startswith("<s>[system] Be brief</s>[user] Hello")
    assert decoded(task, examples, 1)[0].startswith("<s>[system] Be kind</s>[user]")


def test_conversations_may_have_a_column_of_system_prompts(task_of):
    chats = {"conversations": CHATS["messages"][:2] * 2, "system": ["Be quick", "Mine", "", None]}
    table = Dataset.from_dict(chats)
    task = task_of("llama", table, name=NAME, system_prompt="Be brief")
    examples = task.encode(table)
    for row, start in enumerate(["Be quick", "Be kind", "Be brief", "Be kind"]):
        assert decoded(task, examples, row)[0].startswith(f"<s>[system] {start}</s>[user]")
    with pytest.raises(DataError, match=r"row 0 .*'system' must be a text, not 3"):
        task.encode(Dataset.from_dict({**chats, "system": [3] * 4}))


# --- tools ----------------------------------------------------------------------------------------
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
WITH_TOOLS = [
    {"role": "user", "content": "Add"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "5"},
    {"role": "assistant", "content": "Five"},
]


@pytest.mark.parametrize("written", ["objects", "JSON", "function_call"])
def test_tool_calls_are_part_of_the_assistants_turn(chat_task, written):
    call = {**CALL["function"], "arguments": json.dumps(CALL["function"]["arguments"])}
    chat = [dict(message) for message in WITH_TOOLS]
    tools = [{"name": "add", "about": "Adds"}]
    if written == "JSON":
        chat[1]["tool_calls"] = [{**CALL, "function": call}]
    if written == "function_call":
        chat[1] = {"role": "assistant", "content": "", "function_call": call}
    rows = {"messages": [chat], "tools": [tools if written == "objects" else json.dumps(tools)]}
    task, table = chat_task(QWEN25, rows)
    whole, learned = decoded(task, task.encode(table))
    assert learned == (
        '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>\n'
        "Five<|im_end|>\n"
    )
    assert '"about": "Adds"' in whole


def test_tools_that_the_template_does_not_write_are_refused(chat_task):
    chat = [{"tool_calls": None, **message} for message in WITH_TOOLS]
    task, table = chat_task(CHATML, {"messages": [chat]})
    with pytest.raises(DataError, match=r"row 0 .*the chat template leaves out the tool 'add'"):
        task.encode(table)


def test_messages_that_the_template_leaves_out_are_counted(chat_task, caplog):
    template = MISTRAL.plain.replace("message['content'] + ' [/INST]'", "' [/INST]'")
    task, table = chat_task(MISTRAL, {"messages": [CHAT]}, chat_template=template)
    task.encode(table)
    assert "in 1 of 1 chats the chat template leaves out or changes the text" in caplog.text


def test_reasoning_that_the_template_leaves_out_is_counted(chat_task, caplog):
    thought = [*CHAT[:-1], {**CHAT[-1], "reasoning_content": "Let me see."}]
    task, table = chat_task(MISTRAL, {"messages": [thought]})
    task.encode(table)
    assert "in 1 of 1 chats the chat template leaves out or changes the text" in caplog.text


@pytest.mark.parametrize("marks", [("", ""), ("{% generation %}", "{% endgeneration %}")])
def test_a_template_with_a_clock_writes_the_same_date_on_every_day(chat_task, caplog, marks):
    begin, end = marks
    dated = (
        "{{ strftime_now('%d %B %Y, %-m/%-H, %H:%M:%S.%f') }}|{% for m in messages %}"
        "{% if m.role == 'user' %}{{ m.content }}|{% else %}"
        f"{begin}{{{{ m.content + eos_token }}}}{end}{{% endif %}}{{% endfor %}}"
    )
    task, table = chat_task(CHATML, {"messages": [CHAT]}, chat_template=dated)
    text, learned = decoded(task, task.encode(table))
    assert text.startswith("26 July 2024, 7/0, 00:00:00.000000|Name a colour|")
    assert learned == "Red is one</s>Five</s>"
    assert "the chat template writes the current date" in caplog.text
    assert task.processor.decode(task.encode_prompts([CHAT[:1]]).columns["prompt"][0]) == (
        "26 July 2024, 7/0, 00:00:00.000000|Name a colour|"
    )


# --- the template of the recipe -------------------------------------------------------------------
OWN = "{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}"


@pytest.mark.parametrize("source", ["text", "file", "name"])
def test_the_recipe_may_give_the_chat_template(task_of, tiny_models, tmp_path, source):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_models / "llama")
    tokenizer.chat_template = {"own": OWN, "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "own.jinja").write_text(OWN)
    given = {"text": OWN, "file": str(tmp_path / "own.jinja"), "name": "own"}[source]
    task = task_of(
        "llama",
        CHATS,
        name=NAME,
        backbone={"tokenizer": str(tmp_path / "tokenizer")},
        chat_template=given,
    )
    assert decoded(task, task.encode(CHATS), 0)[0] == "user:Hello</s>assistant:Good day</s>"
    assert task.recipe.chat_template == ("own" if source == "name" else OWN)


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        ("missing/chat.jinja", RecipeError, "task.chat_template: .*chat.jinja does not exist"),
        ("chatml", DataError, "task.chat_template: the tokenizer has no template 'chatml'; it has"),
    ],
)
def test_a_template_that_is_not_there_is_refused(task_of, template, error, message):
    with pytest.raises(error, match=message):
        task_of("llama", CHATS, name=NAME, chat_template=template)


# --- truncation -----------------------------------------------------------------------------------
def test_a_long_chat_is_truncated_on_the_right(task_of):
    table = Dataset.from_dict({"messages": [CHAT]})
    whole = task_of("llama", table, name=NAME).encode(table).columns["input_ids"][0]
    examples = task_of("llama", table, name=NAME, max_length=len(whole) - 4).encode(table)
    assert examples.columns["input_ids"][0].tolist() == whole[:-4].tolist()


@pytest.mark.parametrize("length", [2, 9, 40])
def test_truncation_leaves_every_chat_tokens_with_a_loss(task_of, length):
    chat = [{"role": "user", "content": "x " * 60}, *CHAT[1:]]
    table = Dataset.from_dict({"messages": [chat]})
    task = task_of("llama", table, name=NAME, max_length=length)
    examples = task.encode(table)
    whole, learned = decoded(task, examples)
    assert len(examples.columns["input_ids"][0]) <= length
    assert learned
    assert " Red is one</s>".startswith(learned)
    assert whole.endswith(learned)
    assert length == 2 or whole.startswith("<s>")


def test_the_last_message_is_kept_whole_if_only_it_has_a_loss(task_of):
    table = Dataset.from_dict({"messages": [CHAT]})
    task = task_of("llama", table, name=NAME, max_length=12, loss="completion")
    whole, learned = decoded(task, task.encode(table))
    assert learned == "Five</s>"
    assert whole.startswith("<s>")


@pytest.mark.parametrize(
    "value", ["[" * 100_000, [{"from": ["human"], "value": "Hi."}]], ids=["deep", "role"]
)
def test_messages_of_no_known_form_are_refused_in_short(value):
    with pytest.raises(DataError) as refused:
        parse_messages(value, "messages", "row 0: ")
    assert len(str(refused.value)) < 400
