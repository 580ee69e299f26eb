"""Logging of a command: this package's warnings, without the libraries' harmless messages."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING

from fedmerge_peft.util.text import printable

if TYPE_CHECKING:
    from rich.console import Console


_SHOWN = ("federation.tuning", "sites.site.trainer")
"""Modules whose messages of level INFO are printed, too: on chosen values and on the folders of a
site's adapters."""


class _PrintableFormatter(logging.Formatter):
    """Escape control characters, which names of clients and columns may contain."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))


def configure_logging(console: Console, *, engines_only: bool = False) -> None:
    """Print this package's warnings to ``console``, and silence the libraries' ``FutureWarning``.

    Messages of level INFO are printed for the modules in ``_SHOWN``, such as values chosen for
    ``auto``.

    Args:
        console: Destination of the warnings.
        engines_only: Print messages of ``fedmerge_peft.engines`` only. Set on all ranks except 0,
            because other messages are identical on all ranks.
    """
    from rich.logging import RichHandler

    handler = RichHandler(console=console, show_time=False, show_path=False, markup=False)
    handler.setFormatter(_PrintableFormatter())
    if engines_only:
        handler.addFilter(logging.Filter("fedmerge_peft.engines"))
    package = logging.getLogger("fedmerge_peft")
    package.handlers = [handler]
    package.propagate = False
    for name in _SHOWN:
        logging.getLogger(f"fedmerge_peft.{name}").setLevel(logging.INFO)
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"(transformers|peft|accelerate|datasets|torch)\b"
    )
