"""A reference of the command line, from the help texts of its commands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

INTRODUCTION = """# Commands

`fedmerge COMMAND --help` prints the same texts. `KEY=VALUE` stands for any key of a
[recipe](recipes.md). [Using a run](using.md#diagnostics) lists the exit codes.
"""


def on_files(files: Any, config: Any) -> Any:
    """Add the page ``commands.md``."""
    from properdocs.structure.files import File

    files.append(File.generated(config, "commands.md", content=page()))
    return files


def page() -> str:
    """Return the page, a section for each command and subcommand."""
    import typer

    from fedmerge_peft import cli
    from fedmerge_peft.cli.app import app

    for module in iter_modules(cli.__path__):  # each import adds its commands
        import_module(f"{cli.__name__}.{module.name}")
    return "\n".join([INTRODUCTION, *sections(typer.main.get_command(app), "fedmerge")])


def sections(command: Any, name: str) -> Iterator[str]:
    """Yield the sections of a command's own commands."""
    for each in sorted(command.commands.values(), key=lambda one: one.name):
        full = f"{name} {each.name}"
        yield f"## {full}\n\n{as_code(each.help or '')}\n"
        if hasattr(each, "commands"):
            yield from sections(each, full)
        else:
            yield from rows(each)


def as_code(text: str) -> str:
    """Set examples, the paragraphs that open with ``Example:``, as code."""
    paragraphs = [" ".join(each.split()) for each in text.strip().split("\n\n")]
    return "\n\n".join(re.sub(r"^Example: (.*)", r"Example: `\1`", each) for each in paragraphs)


def rows(command: Any) -> Iterator[str]:
    """Yield the table of a command's arguments and options."""
    shown = [one for one in command.params if one.name != "help" and not one.hidden]
    if not shown:
        return
    yield "| argument | meaning |\n|---|---|"
    for one in shown:
        names = [*one.opts, *one.secondary_opts] if one.param_type_name == "option" else []
        label = ", ".join(f"`{name}`" for name in names) or f"`{one.metavar or one.name.upper()}`"
        meaning = " ".join((one.help or "").split()).replace("|", "\\|")
        yield f"| {label} | {meaning} |"
    yield ""
