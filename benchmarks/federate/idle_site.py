"""Site that returns an update without training, to time the messages; see ``overhead.py``."""

import os
import sys
from pathlib import Path

from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.sites.config import ADDRESS_VARIABLE, KIT_VARIABLE, SITE_FILE, SiteSettings
from fedmerge_peft.sites.site.connection import serve
from fedmerge_peft.sites.site.trainer import Trainer
from fedmerge_peft.strategies.base import Reply
from fedmerge_peft.util.exit_with_parent import exit_with_parent


def reply_without_training(engine, round, assignments):
    """Yield a small update for each assignment; replaces ``LocalEngine.train_clients``."""
    for index, assignment in assignments:
        scores = {"test_accuracy": 0.5, "test_loss": 1.0}
        yield (
            assignment.plan,
            Reply(
                index,
                1e-3 * assignment.plan.sent,
                engine.clients[index].size,
                1.0,
                0.0,
                served=None if assignment.served is None else scores,
                round=round,
            ),
        )


if __name__ == "__main__":
    exit_with_parent()
    LocalEngine.train_clients = reply_without_training
    kit = Path(os.environ[KIT_VARIABLE])
    trainer = Trainer(kit, sys.argv[1], SiteSettings.read(kit / SITE_FILE))
    serve(trainer, os.environ[ADDRESS_VARIABLE])
