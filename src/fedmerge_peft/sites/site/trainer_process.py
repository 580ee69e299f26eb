"""Trainer process of a site, which reads the data once and keeps the model across jobs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fedmerge_peft.errors import FedMergeError
from fedmerge_peft.sites.config import (
    ADDRESS_VARIABLE,
    KIT_VARIABLE,
    PERMANENT_FAILURE,
    SETTINGS_VARIABLE,
    SiteSettings,
)
from fedmerge_peft.sites.site.connection import serve
from fedmerge_peft.util.exit_with_parent import exit_with_parent
from fedmerge_peft.util.text import printable_lines


def main() -> None:
    """Run the trainer of the site that the command line names.

    Environment variables contain the path of the kit, the settings, and the address of the socket.
    The process exits with ``PERMANENT_FAILURE`` if ``Trainer`` raises a ``FedMergeError``.
    """
    exit_with_parent()
    site = sys.argv[1]
    from rich.console import Console

    from fedmerge_peft.sites.site.trainer import Trainer
    from fedmerge_peft.util.logs import configure_logging

    configure_logging(Console(stderr=True, highlight=False))
    try:
        settings = SiteSettings.model_validate_json(os.environ[SETTINGS_VARIABLE])
        trainer = Trainer(Path(os.environ[KIT_VARIABLE]), site, settings)
    except FedMergeError as error:
        print(printable_lines(str(error)), file=sys.stderr, flush=True)
        sys.exit(PERMANENT_FAILURE)
    sizes = ", ".join(
        f"{client.name}: {client.size} training example{'s' * (client.size != 1)}"
        for client in trainer.data.clients
    )
    print(f"site {site} is ready ({sizes})", file=sys.stderr, flush=True)
    address = os.environ[ADDRESS_VARIABLE]
    Path(address).unlink(missing_ok=True)  # left by a trainer that died
    serve(trainer, address)


if __name__ == "__main__":
    main()
