"""``fedmerge data --show``: rows as tokens."""

from __future__ import annotations

import json
import re

import pytest

from fedmerge_peft.cli import main

CHAT = [
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Me"},
    {"role": "user", "content": "Why"},
    {"role": "assistant", "content": "So"},
]


@pytest.fixture
def shown(tmp_path, capsys, monkeypatch):
    """``shown(rows, task, *arguments)``: output of the command."""
    monkeypatch.setenv("COLUMNS", "900")

    def show(rows, task, *arguments, model="tiny:llama"):
        (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        recipe = {
            "name": "shown",
            "task": task,
            "backbone": {"model": model},
            "lora": {"target_modules": "all-linear"},
            "data": {
                "path": str(tmp_path / "data.jsonl"),
                "partition": {"scheme": "natural", "by": "site"},
            },
        }
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        with pytest.raises(SystemExit) as code:
            main(["data", str(tmp_path / "recipe.yaml"), "--show", *arguments])
        assert code.value.code == 0
        return capsys.readouterr().out

    return show


def rows_of(values):
    return [{**values, "site": f"s{number % 2}"} for number in range(8)]


def segments(output):
    """Return mark, role and text of each segment."""
    lines = re.findall(r"^(loss|cut |    )  (\S+(?: \d+)?) +(.*)$", output, re.MULTILINE)
    return [(mark.strip(), role, text.replace("│", "").strip()) for mark, role, text in lines]


def test_a_chat_shows_roles_tokens_and_losses(shown):
    output = shown(rows_of({"messages": CHAT}), {"name": "causal-lm"}, "1")
    assert segments(output) == [
        ("", "user", "<s>[user] Who?</s>"),
        ("", "assistant", "[assistant]"),
        ("loss", "assistant", "Me</s>"),
        ("", "user", "[user] Why</s>"),
        ("", "assistant", "[assistant]"),
        ("loss", "assistant", "So</s>"),
    ]
    assert "none of 8 examples is cut" in output


def test_cut_tokens_are_shown_and_examples_counted(shown):
    rows = rows_of({"prompt": "abc" * 20, "completion": "xyz"})
    output = shown(rows, {"name": "causal-lm", "max_length": 20}, "3")
    assert (
        len(
            re.findall(r"^row \d+, client s[01]: 20 tokens, \d with a loss, \d+ cut$", output, re.M)
        )
        == 3
    )
    assert {"client s0", "client s1"} <= set(re.findall(r"client s\d", output))
    marks = [(mark, role) for mark, role, _ in segments(output)]
    assert marks[:4] == [("", "prompt"), ("cut", "prompt"), ("", "prompt"), ("loss", "completion")]
    assert (
        "8 of 8 examples are longer than 20 tokens and were truncated (4 of 4 training, 2 of 2"
        in output
    )


def test_the_middle_of_long_examples_is_left_out(shown):
    """A chat of 40 messages, the first of which is long, of which 128 tokens are kept."""
    long = [{**CHAT[0], "content": "Who? " * 400}, *CHAT[1:], *CHAT * 9]
    output = shown(rows_of({"messages": long}), {"name": "causal-lm"}, "1")
    rows = segments(output)
    assert len(rows) == 16
    (first,) = [text for _, _, text in rows if "tokens not shown]" in text]
    assert int(first.split("[")[-1].split(" ")[0].replace(",", "")) > 200
    assert 10 < first.count("Who?") < 100
    assert re.search(r"\[[\d,]+ parts with [\d,]+ tokens not shown\]", output)
    assert "So</s>" in rows[-1][2]


def test_classification_shows_the_label(shown):
    rows = [
        {**row, "label": ["no", "yes"][number // 4]}
        for number, row in enumerate(rows_of({"text": "fine"}))
    ]
    output = shown(rows, {"name": "sequence-classification"}, "1", model="tiny:bert")
    assert segments(output) == [("", "text", "[CLS]fine[SEP]")]
    assert "none of 8 examples is cut" in output
    assert re.search(r"^row \d, client s[01]: \d+ tokens, label (no|yes)$", output, re.M)


def test_question_answering_marks_the_answer_in_each_window(shown):
    """The first window has the answer; in the others, the first token stands for no answer."""
    context = "the colour of it is red, and all else about it is long and of no use"
    own = {"context": context, "question": "colour?", "answers": {"text": ["red"]}}
    own["answers"]["answer_start"] = [context.index("red")]
    task = {"name": "question-answering", "max_length": 40, "stride": 10}
    parts = segments(shown(rows_of(own), task, "1", model="tiny:bert"))
    answers = {text for mark, role, text in parts if (mark, role) == ("loss", "answer")}
    assert answers == {"red", "[CLS]"}
    assert {role for _, role, _ in parts} >= {"window 0", "window 1", "answer"}
    assert parts[0][2].startswith("[CLS]colour?")


def test_sentence_embedding_shows_the_texts_of_a_row(shown):
    own = {"anchor": "ask", "positive": "yes", "negative": "no"}
    task = {"name": "sentence-embedding", "anchor": "anchor", "positive": "positive"}
    output = shown(rows_of(own), {**task, "negative": "negative"}, "1", model="tiny:bert")
    assert segments(output) == [
        ("", "anchor", "[CLS]ask[SEP]"),
        ("", "positive", "[CLS]yes[SEP]"),
        ("", "negative", "[CLS]no[SEP]"),
    ]


def test_images_cannot_be_shown(tmp_path, capsys):
    recipe = {
        "name": "images",
        "task": {"name": "image-classification"},
        "backbone": {"model": "tiny:vit"},
        "lora": {"target_modules": "all-linear"},
        "data": {
            "path": str(tmp_path / "data.jsonl"),
            "partition": {"scheme": "iid", "clients": 2},
        },
    }
    image = [[[0, 0, 0], [9, 9, 9]], [[0, 0, 0], [9, 9, 9]]]
    rows = [{"image": image, "label": number % 2} for number in range(12)]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    with pytest.raises(SystemExit) as code:
        main(["data", str(tmp_path / "recipe.yaml"), "--show", "1"])
    assert code.value.code == 2
    assert "the examples of this task cannot be shown" in capsys.readouterr().err
