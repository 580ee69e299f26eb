"""``fedmerge init``: write a recipe for a table, from a few questions."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmerge_peft.cli.app import app, write_file

if TYPE_CHECKING:
    from fedmerge_peft.data.guesses import ColumnProfile
    from fedmerge_peft.recipe.draft import Answers
    from fedmerge_peft.recipe.tasks import TaskRecipe

_ASKED = {
    "image": ("image", "Column with the images"),
    "text": ("text", "Column with the texts"),
    **dict.fromkeys(("label", "number", "list"), ("label", "Column with the labels")),
}
"""Option and question for columns of these kinds. Other columns use their recipe key."""
_NONE = "none"
"""Answer for a table without a column that names the clients."""


class _Questions:
    """Answers to the questions, from options, from the terminal, or from suggestions.

    Args:
        ask: True to ask at the terminal, False to take the suggestions.
    """

    def __init__(self, *, ask: bool) -> None:
        self._ask = ask

    def text(
        self,
        option: str,
        question: str,
        given: str | None,
        suggested: str | None,
        among: str = "",
    ) -> str:
        """Return the option's value, else the answer at the terminal, else the suggestion.

        Args:
            option: What an error advises to give: the option, the argument, or a column.
            question: Text of the question.
            given: Value of the option, if it was given.
            suggested: Suggested answer, if there is one.
            among: Text that lists the possible answers.

        Raises:
            RecipeError: The option has no value, and the input ends before an answer; or the
                suggestion is to be taken, but there is none.
        """
        from fedmerge_peft.errors import RecipeError

        if given is not None:
            return given
        wanted = f"give {option}{among if option.startswith('--') else ''}"
        if not self._ask:
            if suggested is None:
                raise RecipeError(f"init: {question}: there is no suggestion; {wanted}")
            return suggested
        if suggested is None and among:
            print(f"{question}{among}")
        try:
            return str(typer.prompt(question, default=suggested)).strip()
        except typer.Abort:
            if sys.stdin.isatty():
                raise KeyboardInterrupt from None
            remedy = wanted if suggested is None else "--yes takes the suggestions"
            raise RecipeError(
                f"init: {question}: no answer, so nothing was written; {remedy}"
            ) from None

    def choice(
        self,
        option: str,
        question: str,
        given: str | None,
        suggested: str | None,
        choices: Sequence[str],
    ) -> str:
        """Return one of ``choices``. Repeat the question until the answer is one of them.

        The other arguments are those of ``text``.

        Raises:
            RecipeError: The option's value or the suggestion is not among the choices; or as
                ``text``.
        """
        from fedmerge_peft.data.columns import did_you_mean, join_values
        from fedmerge_peft.errors import RecipeError
        from fedmerge_peft.util.text import printable

        among = printable(f", one of {join_values(choices)}")
        while (answer := self.text(option, question, given, suggested, among)) not in choices:
            fault = printable(
                f"{question}: {answer!r} is not among {join_values(choices)}"
                f"{did_you_mean(answer, choices)}"
            )
            if given is not None or not self._ask:
                raise RecipeError(f"init: {option}: {fault}")
            print(fault)
        return answer


@app.command()
def init(
    table: Annotated[
        str | None,
        typer.Argument(
            metavar="TABLE", help="File, folder, one file per client ('clients/*.csv'), or hub id."
        ),
    ] = None,
    task: Annotated[str | None, typer.Option(help="Task, as in fedmerge ls --all.")] = None,
    text: Annotated[str | None, typer.Option(help="Column with the text.")] = None,
    label: Annotated[
        str | None, typer.Option(help="Column with the label, or the number to predict.")
    ] = None,
    image: Annotated[str | None, typer.Option(help="Column with the image or its path.")] = None,
    client: Annotated[
        str | None, typer.Option(help="Column that names the client; none for random clients.")
    ] = None,
    clients: Annotated[
        int | None,
        typer.Option(help="Number of random clients, if no column names the clients.", min=1),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Hub id or folder of the model.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="File to write; never overwritten. Default: NAME.yaml for NAME.csv."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Take all suggestions.")] = False,
) -> None:
    """Write a recipe for your own table, from a few questions.

    Most suggestions, in brackets, come from the table. Options answer questions in advance.

    Example: fedmerge init tickets.csv --client office --yes
    """
    import shlex

    from fedmerge_peft.data import federate_data
    from fedmerge_peft.errors import RecipeError
    from fedmerge_peft.recipe import Recipe
    from fedmerge_peft.recipe.draft import draft
    from fedmerge_peft.recipe.loading import loads
    from fedmerge_peft.util.text import printable

    if clients is not None and client not in (None, _NONE):
        raise RecipeError(
            "init: --clients is the number of random clients, but --client names a column; "
            "remove one of the two options"
        )
    questions = _Questions(ask=not yes)
    path = questions.text("TABLE", "Table (a file, a folder or a hub id)", table, None)
    target = out or Path(f"{_name(path)}.yaml")
    if target.exists():
        raise RecipeError(printable(f"{target}: already exists; name another file with --out"))
    chosen = {"task": task, "text": text, "label": label, "image": image, "client": client}
    if clients is not None:
        chosen["client"] = _NONE
    answers = _answers(questions, path, target, chosen, clients, model)
    content = draft(answers)
    recipe = loads(Recipe, content, str(target))
    section = recipe.task
    federated = federate_data(recipe.data, section.label_column, recipe.seed, section.media_column)
    write_file(target, content, "x")
    file = shlex.quote(str(target))
    count = len(federated.clients)
    made = f"{count} client{'s' * (count != 1)}, {recipe.backbone.model}"
    print(printable(f"Wrote {target}: {made}"))
    print(printable(f"Next: fedmerge data {file}, then fedmerge run {file}"))


def _answers(
    questions: _Questions,
    path: str,
    target: Path,
    given: dict[str, str | None],
    clients: int | None,
    model: str | None,
) -> Answers:
    """Read the table, print its columns, ask the questions, and return the answers."""
    from fedmerge_peft.data import guesses
    from fedmerge_peft.data.loading import load_splits
    from fedmerge_peft.errors import RecipeError
    from fedmerge_peft.plugins import TASKS, import_installed
    from fedmerge_peft.recipe.data import DataRecipe, IidRecipe
    from fedmerge_peft.recipe.draft import Answers
    from fedmerge_peft.util.text import printable

    import_installed()
    sections = TASKS.sections()
    source = DataRecipe(path=path, partition=IidRecipe(scheme="iid", clients=1))
    rows = load_splits(source)["train"]
    columns = guesses.describe(rows)
    some_rows = f"{len(rows):,} row{'s' * (len(rows) != 1)}"
    print(f"{some_rows} with {len(columns)} column{'s' * (len(columns) != 1)}:")
    for column in columns:
        print(printable(f"  {column}"))
    if any(column.is_value for column in columns):
        print("A column name looks like a value. If the table has no column names, add them.")
    names = [column.name for column in columns]
    own = [column for column in columns if column.name != given["client"]]
    guess = guesses.guess_task(own, len(rows), given["label"])
    task = questions.choice("--task", "Task", given["task"], guess, [*sections])
    roles = _columns(questions, task, columns, len(rows), given)
    split = guesses.guess_split(rows)
    taken = [*_flat(roles), *filter(None, [split])]
    default = guesses.guess_client(columns, len(rows), taken) or _NONE
    question = f"Column that names the client ({_NONE} for random clients)"
    client = questions.choice("--client", question, given["client"], default, [*names, _NONE])
    count = 4
    if client == _NONE:
        number = questions.text(
            "--clients", "Number of clients", None if clients is None else str(clients), "4"
        )
        if not number.isdecimal() or not int(number):
            raise RecipeError(
                printable(f"init: expected a number of clients above 0, found {number!r}")
            )
        count = int(number)
    small = sections[task].small_model
    chosen = questions.text("--model", "Model (a hub id or a folder)", model, small)
    return Answers(
        name=_name(path),
        file=str(target),
        task=task,
        path=path,
        model=chosen,
        columns=roles,
        client=None if client == _NONE else client,
        clients=count,
        split=split,
    )


def _columns(
    questions: _Questions,
    task: str,
    columns: Sequence[ColumnProfile],
    rows: int,
    given: dict[str, str | None],
) -> dict[str, str | list[str]]:
    """Return the columns to write into the task's section, by key: one column or a list of columns.

    Keys for optional columns that the table lacks are omitted. If the task reads columns of this
    table by default, the result is empty.
    """
    from fedmerge_peft.data.guesses import guess_any, guess_choices, guess_column
    from fedmerge_peft.errors import RecipeError
    from fedmerge_peft.plugins import TASKS

    section: type[TaskRecipe] = TASKS.sections()[task]
    names = [column.name for column in columns]
    roles: dict[str, str | list[str]] = {}
    usual_columns = section.usual_columns
    if any(set(names).issuperset(known.split()) for known in section.known_columns):
        usual_columns = {}  # the task reads these columns by default
    read = {_ASKED.get(usual.kind, (key,))[0] for key, usual in usual_columns.items()}
    for option in ("text", "label", "image"):
        if given[option] is not None and option not in read:
            raise RecipeError(
                f"init: --{option} has no effect on the task {task} with this table; "
                "remove the option, or choose another --task"
            )
    for key, usual in usual_columns.items():
        taken = [*_flat(roles), *filter(None, (given["client"], given["label"]))]
        if usual.kind == "choices" and len(several := guess_choices(usual, columns, taken)) > 1:
            roles[key] = several  # the columns' names are unambiguous, so no question is needed
            continue
        suggested = guess_column(usual, columns, rows, taken)
        if usual.kind == "choices":
            suggested = next(iter(several), None)
        if usual.kind == "named" and usual.optional:
            roles |= {} if suggested is None else {key: suggested}
            continue
        name, question = _ASKED.get(usual.kind, (key, f"Column for task.{key}"))
        if suggested is None and usual.kind in ("number", "list", "label"):
            suggested = guess_any(usual.kind, columns, rows, taken)
        option = f"--{name}"
        if name not in given:
            option = f"the table a column named {usual.names.split()[0]}"
        roles[key] = questions.choice(option, question, given.get(name), suggested, names)
    return roles


def _flat(roles: dict[str, str | list[str]]) -> list[str]:
    """Return the columns of all keys in one list."""
    return [name for own in roles.values() for name in ([own] if isinstance(own, str) else own)]


def _name(path: str) -> str:
    """Return a table's name without folders and suffixes; for a pattern, its folder's name.

    Without such a name, return ``recipe``.
    """
    parts = [part for part in Path(path).parts if not set(part) & set("*?[")]
    name = Path(parts[-1]).name.partition(".")[0] if parts else ""
    return name.split(":")[-1] or "recipe"
