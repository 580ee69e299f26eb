"""NVIDIA FLARE's processes, which run behind the gate (``gate``) and exit with their parent.

python -m fedmerge_peft.sites.flare.child server KIT
python -m fedmerge_peft.sites.flare.child client KIT SITE
python -m fedmerge_peft.sites.flare.child runner_process ARGUMENTS     (a job at the server)
python -m fedmerge_peft.sites.flare.child worker_process ARGUMENTS     (a job at a site)
"""

from __future__ import annotations

import runpy
import sys

from fedmerge_peft.util.exit_with_parent import exit_with_parent

_JOBS = {
    "runner_process": "nvflare.private.fed.app.server.runner_process",
    "worker_process": "nvflare.private.fed.app.client.worker_process",
}


def main() -> None:
    """Run the module that FLARE would run, behind the gate."""
    exit_with_parent()
    from fedmerge_peft.sites.flare.configuration import search_only_own_files
    from fedmerge_peft.sites.flare.gate import close_gate
    from fedmerge_peft.sites.flare.local_sockets import use_local_sockets

    search_only_own_files()
    use_local_sockets()
    close_gate()
    kind, *arguments = sys.argv[1:]
    if kind in _JOBS:
        run(_JOBS[kind], arguments)
        return
    if kind == "client":
        from fedmerge_peft.sites.flare.site_requests import restrict_requests

        restrict_requests()
    run_main_process(kind, arguments)


def run_main_process(kind: str, arguments: list[str]) -> None:
    """Run FLARE's main process with the arguments of its start script.

    Args:
        kind: ``server`` or ``client``.
        arguments: The kit; for ``client``, also the name of the site.
    """
    kit, *site = arguments
    names = [f"uid={site[0]}"] if site else []
    options = ["--set", "secure_train=true", *names, "org=federation", "config_folder=config"]
    module = f"nvflare.private.fed.app.{kind}.{kind}_train"
    run(module, ["-m", kit, "-s", f"fed_{kind}.json", *options])


def run(module: str, arguments: list[str]) -> None:
    """Run a module as the main program."""
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
