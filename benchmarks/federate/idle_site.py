"""A site that trains nothing: all of the way of a message, and an update that costs no time. Started by ``overhead.py``."""

import os
import sys
from pathlib import Path

from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.sites.config import SITE, SiteSettings
from fedmerge_peft.sites.exit_with_parent import end_with_parent
from fedmerge_peft.sites.site.connection import ADDRESS, KIT, serve
from fedmerge_peft.sites.site.trainer import Trainer
from fedmerge_peft.strategies.base import Reply


def idle(engine, round, visits):
    for index, plan, served in visits:
        scores = None if served is None else {"test_accuracy": 0.5, "test_loss": 1.0}
        yield Reply(
            index,
            1e-3 * plan.sent,
            engine.clients[index].size,
            1.0,
            0.0,
            served=scores,
            round=round,
        )


if __name__ == "__main__":
    end_with_parent()
    LocalEngine.train_clients = idle
    kit = Path(os.environ[KIT])
    serve(Trainer(kit, sys.argv[1], SiteSettings.read(kit / SITE)), os.environ[ADDRESS])
