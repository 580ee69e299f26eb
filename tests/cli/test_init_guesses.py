"""``fedmerge init`` recognizes tables by their columns, and asks if several tasks fit."""

import json

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

import fedmerge_peft.cli.init  # adds the command  # noqa: F401
from fedmerge_peft import Recipe, RecipeError
from fedmerge_peft.cli.app import app
from fedmerge_peft.data.loading import load_splits
from fedmerge_peft.plugins import TASKS


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def init(*arguments, answers=None):
    return CliRunner().invoke(app, ["init", *arguments], input=answers)


def fault(*arguments):
    result = init(*arguments)
    assert isinstance(result.exception, RecipeError), result.output
    return str(result.exception)


def made(here, columns, count=24):
    """Write a table; values may be functions of the row."""
    rows = [{k: v(n) if callable(v) else v for k, v in columns.items()} for n in range(count)]
    (here / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return "t.jsonl"


def a_text(n):
    return f"A longer text about the thing number {n}"


def one_of(*values):
    return lambda n: values[n % len(values)]


ARC = {"text": ["a", "b", "c"], "label": ["A", "B", "C"]}
ENDINGS = {f"ending{n}": f"it ends {n}" for n in range(3)}


@pytest.mark.parametrize(
    ("columns", "task"),
    [
        (  # SWAG
            {
                "sent1": a_text,
                "sent2": "it",
                **ENDINGS,
                "label": one_of(0, 2),
            },
            {"context": "sent1", "choices": [*ENDINGS], "start": "sent2", "label": "label"},
        ),
        (  # RACE: without its question, the choices mean nothing
            {"article": a_text, "question": "who?", "options": ["a", "b"], "answer": one_of(*"AB")},
            {"context": "article", "choices": "options", "start": "question", "label": "answer"},
        ),
        (  # PIQA
            {"goal": a_text, "sol1": "this", "sol2": "that", "label": one_of(0, 1)},
            {"context": "goal", "choices": ["sol1", "sol2"], "label": "label"},
        ),
        (  # MMLU, in CSV files
            {"question": a_text, "A": "a", "B": "b", "C": "c", "answer": one_of(*"ABC")},
            {"context": "question", "choices": [*"ABC"], "label": "answer"},
        ),
        (  # ARC
            {"question": a_text, "choices": ARC, "answerKey": one_of(*"ABC")},
            {"context": "question", "choices": "choices", "label": "answerKey"},
        ),
    ],
)
def test_tables_of_multiple_choice_are_recognized(here, columns, task):
    result = init(made(here, columns), "--yes")
    assert result.exit_code == 0, result.exception
    written = yaml.safe_load((here / "t.yaml").read_text())["task"]
    assert written == {"name": "multiple-choice", **task}
    recipe = Recipe.load("t.yaml")
    table = load_splits(recipe.data)["train"]
    TASKS["multiple-choice"].load().check_table(recipe.task, table)


@pytest.mark.parametrize(
    ("columns", "task"),
    [
        ({"context": a_text, "choices": one_of("a", "b"), "label": one_of("x", "y")}, "context"),
        ({"text": a_text, "tokens": one_of(3, 4), "tags": "c", "label": one_of("x", "y")}, "text"),
        ({"document": a_text, "target": one_of("x", "y")}, "document"),
        ({"image": "a.png", "target": [0.5, 1.5], "label": one_of("x", "y")}, None),
    ],
)
def test_columns_of_another_kind_are_not_recognized_by_their_names(here, columns, task):
    Image.new("RGB", (4, 4)).save(here / "a.png")
    assert init(made(here, columns), "--yes").exit_code == 0
    section = Recipe.load("t.yaml").task
    assert section.name == ("image-classification" if task is None else "sequence-classification")
    assert getattr(section, "text", None) == task


@pytest.mark.parametrize(
    "columns",
    [
        {"text": a_text, "label": one_of("x", "y"), "score": lambda n: n / 7},
        {"text": a_text, "site": one_of("n", "s"), "label": one_of(0, 1), "score": lambda n: n / 7},
        {
            "image": "a.png",
            "finding": one_of("x", "y", "z"),
            "site": one_of("n", "s"),
            "score": lambda n: n / 7,
        },
        {"question": a_text, "answer": a_text},
        {"Prompt": a_text, "Completion": a_text},
        {"description": a_text, "price": lambda n: n / 7},
        {"text": a_text, "toxic": one_of(0, 1), "insult": one_of(0, 0, 1)},
    ],
)
def test_tables_that_may_be_for_several_tasks_need_an_answer(here, columns):
    Image.new("RGB", (4, 4)).save(here / "a.png")
    reported = fault(made(here, columns), "--yes")
    assert reported.startswith("init: Task: there is no suggestion; give --task, one of sequence-")
    asked = init("t.jsonl", answers="\n")
    assert "Task, one of sequence-classification, causal-lm" in asked.output
    assert not (here / "t.yaml").exists()


def test_the_task_is_inferred_from_the_column_of_the_labels(here):
    columns = {"text": a_text, "label": one_of("x", "y"), "score": lambda n: n / 7}
    for label, task in (("label", "sequence-classification"), ("score", "text-regression")):
        assert init(made(here, columns), "--yes", "--label", label, "--out", task).exit_code == 0
        assert Recipe.load(task).task.name == task


def test_options_that_a_task_does_not_read_are_refused(here):
    chats = {"messages": [{"role": "user", "content": "a"}], "label": one_of("x", "y")}
    reported = fault(made(here, chats), "--yes", "--label", "label", "--task", "causal-lm")
    assert "init: --label has no effect on the task causal-lm with this table; remove" in reported


@pytest.mark.parametrize(
    ("columns", "target"),
    [
        ({"text": a_text, "price": lambda n: n / 7, "category": one_of("x", "y")}, "price"),
        ({"text": a_text, "stars": one_of(1, 2, 3), "topic": one_of("x", "y")}, "stars"),
    ],
)
def test_a_number_to_predict_may_have_any_name(here, columns, target):
    assert init(made(here, columns), "--yes", "--task", "text-regression").exit_code == 0
    assert Recipe.load("t.yaml").task.target == target
