"""Controller and executor for NVIDIA FLARE's simulator, which empties its own workspace.

The kits are in the folder ``FEDMERGE_SIMULATED``.

simulated.py WORKSPACE JOB site,site
"""

import os
import sys
from pathlib import Path

from nvflare.private.fed.app.simulator.simulator_runner import SimulatorRunner

from fedmerge_peft.sites.flare.controller import FederationController
from fedmerge_peft.sites.flare.executor import SiteExecutor

KITS = "FEDMERGE_SIMULATED"


class Controller(FederationController):
    def _kit(self, fl_ctx):
        return Path(os.environ[KITS]) / "server"


class Executor(SiteExecutor):
    def _kit(self, fl_ctx):
        return Path(os.environ[KITS]) / "sites" / fl_ctx.get_identity_name()


if __name__ == "__main__":
    workspace, job, sites = sys.argv[1:]
    sys.exit(SimulatorRunner(job, workspace, clients=sites, threads=len(sites.split(","))).run())
