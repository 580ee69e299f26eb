"""A site's long-lived trainer: it reads the data, waits for jobs, and keeps the model from one to the next."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from fedmerge_peft.errors import FedMergeError
from fedmerge_peft.sites.config import (
    ADDRESS,
    KIT,
    REFUSED,
    SETTINGS,
    SiteSettings,
    printable_lines,
)
from fedmerge_peft.sites.exit_with_parent import end_with_parent
from fedmerge_peft.sites.site.connection import serve


def main() -> None:
    """Serve the site that the environment describes; exit code 2 for what would be wrong again."""
    end_with_parent()
    site = sys.argv[1]
    from rich.console import Console

    from fedmerge_peft.sites.site.trainer import Trainer
    from fedmerge_peft.util.logs import configure_logging

    configure_logging(Console(stderr=True, highlight=False))
    try:
        trainer = Trainer(
            Path(os.environ[KIT]), site, SiteSettings.model_validate_json(os.environ[SETTINGS])
        )
    except FedMergeError as error:
        print(printable_lines(str(error).split("\n")), file=sys.stderr, flush=True)
        sys.exit(REFUSED)
    sizes = ", ".join(
        f"{client.name}: {client.size} to train on" for client in trainer.data.clients
    )
    print(f"site {site} is ready ({sizes})", file=sys.stderr, flush=True)
    Path(os.environ[ADDRESS]).unlink(missing_ok=True)  # of a trainer that died
    serve(trainer, os.environ[ADDRESS])


if __name__ == "__main__":
    main()
