"""What the libraries below say while a command runs: our warnings, and nothing of theirs that is no fault."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING

from fedmerge_peft.util.text import printable

if TYPE_CHECKING:
    from rich.console import Console


class _Harmless(logging.Formatter):
    """Messages as a terminal can show them: names of clients and columns may hold characters that steer one."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))


def configure_logging(console: Console, *, engines_only: bool = False) -> None:
    """Print this package's warnings as one line each; silence progress bars and deprecations of the libraries we stand on."""
    from rich.logging import RichHandler

    handler = RichHandler(console=console, show_time=False, show_path=False, markup=False)
    handler.setFormatter(_Harmless())
    if engines_only:
        handler.addFilter(
            logging.Filter("fedmerge_peft.engines")
        )  # the rest says the same on all ranks
    package = logging.getLogger("fedmerge_peft")
    package.handlers = [handler]
    package.propagate = False
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"(transformers|peft|accelerate|datasets|torch)\b"
    )
