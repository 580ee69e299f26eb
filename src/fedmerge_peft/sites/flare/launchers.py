"""Launchers that start NVIDIA FLARE's jobs behind the gate (``gate``)."""

from __future__ import annotations

from typing import Any

from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_launcher_spec import JobProcessArgs
from nvflare.app_common.job_launcher.client_process_launcher import ClientProcessJobLauncher
from nvflare.app_common.job_launcher.server_process_launcher import ServerProcessJobLauncher


class SiteJobLauncher(ClientProcessJobLauncher):  # type: ignore[misc]
    """Launcher of a site's jobs."""

    def get_command(self, job_meta: dict[str, Any], fl_ctx: FLContext) -> str:
        """Return the command that starts a job's process behind the gate."""
        return str(super().get_command(job_meta, _behind_gate(fl_ctx)))


class ServerJobLauncher(ServerProcessJobLauncher):  # type: ignore[misc]
    """Launcher of the server's jobs."""

    def get_command(self, job_meta: dict[str, Any], fl_ctx: FLContext) -> str:
        """Return the command that starts a job's process behind the gate."""
        return str(super().get_command(job_meta, _behind_gate(fl_ctx)))


def _behind_gate(fl_ctx: FLContext) -> FLContext:
    """Make ``flare.child`` the module of the job's command; return ``fl_ctx``.

    ``flare.child`` runs FLARE's module behind the gate.
    """
    arguments = fl_ctx.get_prop(FLContextKey.JOB_PROCESS_ARGS)
    option, module = arguments[JobProcessArgs.EXE_MODULE]
    if not str(module).startswith("fedmerge_peft."):
        started = f"fedmerge_peft.sites.flare.child {str(module).rpartition('.')[2]}"
        arguments[JobProcessArgs.EXE_MODULE] = (option, started)
    return fl_ctx
