"""``fedmerge init`` writes recipes that are valid and run."""

import json
from typing import ClassVar

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

import fedmerge_peft.cli.init  # adds the command  # noqa: F401
from fedmerge_peft import Recipe, RecipeError, federate, register_task
from fedmerge_peft.cli.app import app
from fedmerge_peft.plugins import TASKS
from fedmerge_peft.recipe.draft import scalar
from fedmerge_peft.recipe.tasks import TaskRecipe
from fedmerge_peft.recipe.usual_columns import LABEL, UsualColumns, named
from fedmerge_peft.tasks.sequence_classification import SequenceClassificationTask
from fedmerge_peft.testing import isolated_registries
from tasks.made_sounds import write_folder

ROWS = [
    ("North", "The badge reader at the gate is offline.", "access", "train"),
    ("South", "I was charged twice in March.", "billing", "train"),
    ("North", "Two visitors were charged twice.", "billing", "test"),
    ("South", "My password does not work.", "access", "test"),
] * 6


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, header, rows):
    path.parent.mkdir(exist_ok=True)
    lines = [",".join(header), *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def table(here):
    rows = [row[:3] for row in ROWS]
    numbered = [
        (office, f"{body} {number}", label) for number, (office, body, label) in enumerate(rows)
    ]
    write(here / "desks.csv", ["office", "body", "category"], numbered)
    return "desks.csv"


def init(*arguments, answers=None):
    return CliRunner().invoke(app, ["init", *arguments], input=answers)


def fault(*arguments, answers=None):
    result = init(*arguments, answers=answers)
    assert isinstance(result.exception, RecipeError), result.output
    return str(result.exception)


def test_a_folder_of_sounds_is_for_audio_classification(here):
    write_folder(here / "sounds", 9)
    result = init("sounds", "--yes")
    assert result.exit_code == 0, result.output
    task = Recipe.load("sounds.yaml").task
    assert (task.name, task.audio, task.label) == ("audio-classification", "audio", "label")


def test_the_suggestions_make_a_recipe_that_runs(table, here):
    result = init(table, "--yes")
    assert result.exit_code == 0, result.output
    assert "24 rows with 3 columns" in result.output
    assert "Wrote desks.yaml: 2 clients" in result.output
    recipe = Recipe.load("desks.yaml")
    assert (recipe.task.text, recipe.task.label) == ("body", "category")
    assert recipe.data.partition.by == "office"
    quick = ["backbone.model=tiny:bert", "rounds=1", "training.learning_rate=0.01"]
    run = federate(recipe.replace([*quick, "training.device=cpu"]), here / "run")
    assert list(run.clients.index) == ["North", "South"]


def test_questions_have_suggestions_and_wrong_answers_are_asked_again(table):
    result = init(table, answers="\n\ncategori\ncategory\nnone\n3\nme/model\n")
    assert result.exit_code == 0, result.output
    assert "Column with the texts [body]" in result.output
    assert (
        "'categori' is not among office, body, category (did you mean category?)" in result.output
    )
    recipe = Recipe.load("desks.yaml")
    assert recipe.data.partition.clients == 3
    assert recipe.backbone.model == "me/model"


def test_options_answer_questions_in_advance(table):
    options = "--label office --client category --model tiny:bert --out x.yaml --yes"
    result = init(table, *options.split())
    assert result.exit_code == 0, result.output
    recipe = Recipe.load("x.yaml")
    assert (recipe.task.label, recipe.data.partition.by) == ("office", "category")
    assert recipe.backbone.model == "tiny:bert"


def test_a_split_column_is_found(here):
    write(here / "s.csv", ["client", "text", "label", "split"], ROWS)
    assert init("s.csv", "--yes").exit_code == 0
    recipe = Recipe.load("s.yaml")
    assert recipe.data.split_column == "split"
    assert (recipe.task.label, recipe.data.partition.by) == ("label", "client")


def test_texts_without_labels_are_for_a_language_model(here):
    rows = [(f"text number {number}", f"answer {number}") for number in range(24)]
    write(here / "qa.csv", ["prompt", "completion"], rows)
    assert init("qa.csv", "--yes").exit_code == 0
    recipe = Recipe.load("qa.yaml")
    assert recipe.task.name == "causal-lm"
    assert recipe.data.partition.clients == 4  # no column of clients


def test_one_file_a_client(here):
    for number, office in enumerate(["north", "south"]):
        rows = [(f"{row[1]} {number} {place}", row[2]) for place, row in enumerate(ROWS)]
        write(here / "offices" / f"{office}.csv", ["body", "category"], rows)
    result = init("offices/*.csv", "--yes")
    assert "2 clients" in result.output, result.exception
    assert Recipe.load("offices.yaml").data.partition.by == "client"


def test_columns_of_images_are_found(here):
    for number in range(24):
        Image.new("RGB", (4, 4)).save(here / f"{number}.png")
    rows = [(f"{number}.png", "ab"[number % 2], "NS"[number // 12]) for number in range(24)]
    write(here / "scans.csv", ["scan", "finding", "hospital"], rows)
    result = init("scans.csv", "--yes")
    assert result.exit_code == 0, result.exception
    recipe = Recipe.load("scans.yaml")
    assert (recipe.task.image, recipe.task.label) == ("scan", "finding")
    assert recipe.data.partition.by == "hospital"


def test_images_with_fractions_are_for_regression(here):
    for number in range(24):
        Image.new("RGB", (4, 4)).save(here / f"{number}.png")
    write(here / "bones.csv", ["scan", "score"], [(f"{n}.png", n / 7) for n in range(24)])
    assert init("bones.csv", "--yes").exit_code == 0
    task = Recipe.load("bones.yaml").task
    assert (task.name, task.image, task.target) == ("image-regression", "scan", "score")


def test_odd_names_are_quoted(here):
    names = ["client: one", "no", "# label"]
    rows = [dict(zip(names, row[:3], strict=True)) for row in ROWS]
    (here / "odd.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = init(
        "odd.jsonl", "--text", "no", "--label", "# label", "--client", "client: one", "-y"
    )
    assert result.exit_code == 0, result.exception
    recipe = Recipe.load("odd.yaml")
    assert (recipe.task.text, recipe.task.label) == ("no", "# label")
    assert recipe.data.partition.by == "client: one"


@pytest.mark.parametrize(
    "text", ["a", "12", "no", "null", "a: b", "#x", " a", "a\nb", "1e3", "~", ""]
)
def test_each_text_is_a_scalar_that_reads_back(text):
    assert yaml.safe_load(f"key: {scalar(text)}") == {"key": text}


def test_files_are_never_overwritten(table, here):
    (here / "desks.yaml").write_text("mine")
    assert "desks.yaml: already exists; name another file with --out" in fault(table, "--yes")
    assert (here / "desks.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--label", "catgory"], "init: --label: Column with the labels: 'catgory' is not among"),
        (["--task", "regression"], "--task: Task: 'regression' is not among sequence-class"),
        (["--client", "office", "--clients", "3"], "--clients is the number of random clients"),
    ],
)
def test_wrong_options_are_refused(table, here, arguments, message):
    assert message in fault(table, *arguments, "--yes")
    assert not (here / "desks.yaml").exists()


def test_missing_answers_are_named(table, here):
    assert "give TABLE" in fault("--yes")
    assert "no answer, so nothing was written; give TABLE" in fault(answers="")
    assert "no answer, so nothing was written; --yes" in fault(table, answers="")
    assert not list(here.glob("*.yaml"))


def test_a_first_line_that_is_an_example_is_reported(table, here):
    reported = "A column name looks like a value."
    write(here / "bare.csv", ROWS[0][:3], [row[:3] for row in ROWS if row != ROWS[0]])
    assert reported in init("bare.csv", "--yes").stdout
    write(here / "equal.csv", ROWS[0][:3], [row[:3] for row in ROWS])
    assert "add a row of column names before it" in str(init("equal.csv", "--yes").exception)
    write(here / "numbers.csv", ["1", "2.5"], [("a word", 3.5), ("another", 1.5)] * 8)
    assert reported in init("numbers.csv", "--yes").stdout
    assert reported not in init(table, "--yes").stdout


N = 24
TABLES = {
    "token-classification": {"tokens": [["a", "b"]] * N, "ner_tags": [["O", "B-X"]] * N},
    "question-answering": {
        "question": [f"What is {n}?" for n in range(N)],
        "passage": [f"It is {n}." for n in range(N)],
        "answers": [{"text": ["It"], "answer_start": [0]}] * N,
    },
    "seq2seq-lm": {
        "article": [f"a long text {n}" for n in range(N)],
        "summary": [f"text {n}" for n in range(N)],
    },
    "sentence-embedding": {
        "query": [f"what {n}" for n in range(N)],
        "positive": [f"that {n}" for n in range(N)],
    },
    "preference": {
        "prompt": [f"say {n}" for n in range(N)],
        "chosen": ["yes"] * N,
        "rejected": ["no"] * N,
    },
    "multiple-choice": {
        "sent1": [f"what {n}" for n in range(N)],
        "endings": [["yes", "no"]] * N,
        "label": [0, 1] * (N // 2),
    },
    "text-regression": {
        "body": [f"text {n}" for n in range(N)],
        "score": [n / 7 for n in range(N)],
    },
    "multi-label-classification": {
        "body": [f"text {n}" for n in range(N)],
        "labels": [["a"], ["a", "b"]] * (N // 2),
    },
}


@pytest.mark.parametrize("task", TABLES)
def test_the_task_is_inferred_from_the_columns(here, task):
    table = {**TABLES[task], "office": ["north", "south"] * (N // 2)}
    rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    (here / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = init("t.jsonl", "--yes", "--model", "tiny:bert")
    assert result.exit_code == 0, result.output
    recipe = Recipe.load("t.yaml")
    assert recipe.task.name == task
    assert recipe.data.partition.by == "office"
    written = yaml.safe_load((here / "t.yaml").read_text())["task"]
    assert sorted(written.values()) == sorted([task, *TABLES[task]])


def test_a_task_without_its_columns_names_the_usual_ones(here):
    write(here / "t.csv", ["body", "topic"], [row[1:3] for row in ROWS])
    reported = fault("t.csv", "--yes", "--task", "question-answering")
    assert "Column for task.question: there is no suggestion; give the table a column" in reported


def test_every_task_has_a_model_and_columns_of_its_section():
    for section in TASKS.sections().values():
        assert section.small_model
        assert section.usual_columns
        assert section.usual_columns.keys() <= section.model_fields.keys()


class LettersRecipe(TaskRecipe):
    """A task of a plugin."""

    other_names: ClassVar[str] = "mail-routing"
    small_model: ClassVar[str | None] = "me/letters"
    usual_columns: ClassVar[UsualColumns] = {"letter": named("letter brief"), "office": LABEL}

    letter: str = "letter"
    """Column with the letter, as text."""
    office: str = "office"
    """Column with the office: its name."""
    metrics: list[str] = ["accuracy"]


def test_a_plugins_task_is_recognized_like_a_built_in_one(here):
    write(here / "post.csv", ["office", "Brief", "category"], [row[:3] for row in ROWS])
    with isolated_registries():
        register_task("letters", recipe=LettersRecipe)(SequenceClassificationTask)
        result = init("post.csv", "--yes")
        assert result.exit_code == 0, result.exception
        recipe = Recipe.load("post.yaml")
        assert (recipe.task.letter, recipe.task.office) == ("Brief", "category")
        assert (recipe.task.name, recipe.backbone.model) == ("letters", "me/letters")
        assert "letter: Brief   # the column with the letter\n" in (here / "post.yaml").read_text()
        with pytest.raises(RecipeError, match="did you mean 'letters'"):
            Recipe.load("post.yaml", ["task.name=mail_routing"])
