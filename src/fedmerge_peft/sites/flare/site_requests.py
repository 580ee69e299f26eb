"""The only administrative requests that a site executes for the server.

FLARE's client executes about twenty requests, among them shell commands and the configuration of
its logs. It checks the sender's rights only if the sender requests the check, and takes the
sender's role from the request's headers. A site therefore registers only the requests of this
module. The gate checks the sender of a request, and this module checks the id of its job. The site
writes the job's files itself and ignores the files that the server deploys.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from uuid import UUID

from nvflare.apis.job_def import JobMetaKey
from nvflare.apis.workspace import Workspace
from nvflare.private.admin_defs import Message, error_reply, ok_reply
from nvflare.private.defs import RequestHeader, TrainingTopic
from nvflare.private.fed.client.admin import RequestProcessor
from nvflare.private.fed.client.client_engine_internal_spec import ClientEngineInternalSpec
from nvflare.private.fed.client.client_req_processors import ClientRequestProcessors
from nvflare.private.fed.client.scheduler_cmds import (
    CancelResourceProcessor,
    CheckResourceProcessor,
    StartJobProcessor,
)
from nvflare.private.fed.client.training_cmds import (
    AbortAppProcessor,
    ClientStatusProcessor,
    NotifyJobStatusProcessor,
    ShutdownClientProcessor,
)

from fedmerge_peft.sites.flare.job_files import CLIENT_CONFIG, JOB_NAME

_MAX_CLIENTS = 10_000
"""Largest number of sites in a job's description."""


class SiteRequest(RequestProcessor):  # type: ignore[misc]
    """Processor of requests on one topic, which checks a request before FLARE's processor runs it.

    It refuses a request whose job id is not a UUID, and passes on only a reduced description of the
    job.
    """

    def __init__(self, processor: RequestProcessor) -> None:
        self._processor = processor

    def get_topics(self) -> list[str]:
        """Return the topics of FLARE's processor."""
        return list(self._processor.get_topics())

    def process(self, req: Message, app_ctx: ClientEngineInternalSpec) -> Message:
        """Check a request, reduce it, and let FLARE's processor execute it.

        If the request names a job, ``job_description`` replaces its description of the job. A
        request that checks resources or starts a job loses its body, the required resources.
        """
        job = req.get_header(RequestHeader.JOB_ID)
        if job is not None:
            if not is_job_id(job):
                return error_reply("the job's id is not a UUID")
            req.set_header(RequestHeader.JOB_META, job_description(req))
        if req.topic in (TrainingTopic.CHECK_RESOURCE, TrainingTopic.START_JOB):
            req.body = {}
        reply: Message = self._processor.process(req, app_ctx)
        return reply


class Deploy(RequestProcessor):  # type: ignore[misc]
    """Processor of the request to deploy a job. It ignores the files that the server sends."""

    def get_topics(self) -> list[str]:
        """Return the topic of the request."""
        return [TrainingTopic.DEPLOY]

    def process(self, req: Message, app_ctx: ClientEngineInternalSpec) -> Message:
        """Replace the job's folder by a new one with the files that this package defines."""
        job = req.get_header(RequestHeader.JOB_ID)
        if not is_job_id(job):
            return error_reply("the job's id is not a UUID")
        workspace = Workspace(app_ctx.args.workspace, site_name=app_ctx.get_client_name())
        folder = Path(workspace.get_run_dir(job))
        shutil.rmtree(folder, ignore_errors=True)
        config = Path(workspace.get_app_dir(job)) / "config"
        config.mkdir(parents=True)
        (config / "config_fed_client.json").write_text(json.dumps(CLIENT_CONFIG), encoding="utf-8")
        (folder / "fl_app.txt").write_text(JOB_NAME, encoding="utf-8")
        description = json.dumps(job_description(req))
        Path(workspace.get_job_meta_path(job)).write_text(description, encoding="utf-8")
        return ok_reply(body=f"deployed {JOB_NAME}")


def restrict_requests() -> None:
    """Make this process execute only the requests that this module allows.

    Call it before FLARE's client starts.
    """
    allowed = (
        CheckResourceProcessor,
        CancelResourceProcessor,
        StartJobProcessor,
        AbortAppProcessor,
        ClientStatusProcessor,
        NotifyJobStatusProcessor,
        ShutdownClientProcessor,
    )
    ClientRequestProcessors.request_processors = [
        Deploy(),
        *(SiteRequest(processor()) for processor in allowed),
    ]


def is_job_id(value: object) -> bool:
    """Return True for a UUID in canonical form, which cannot be a path to another folder."""
    try:
        return isinstance(value, str) and str(UUID(value)) == value
    except ValueError:
        return False


def job_description(request: Message) -> dict[str, Any]:
    """Return the description of a request's job: its id, the name ``JOB_NAME``, and its sites.

    The request's other entries are dropped, because they could change the start of the job. The
    sites are dropped if they are not a list, or more than ``_MAX_CLIENTS``.
    """
    theirs = request.get_header(RequestHeader.JOB_META)
    clients = theirs.get(JobMetaKey.JOB_CLIENTS.value) if isinstance(theirs, dict) else None
    description = {
        JobMetaKey.JOB_ID.value: request.get_header(RequestHeader.JOB_ID),
        JobMetaKey.JOB_NAME.value: JOB_NAME,
    }
    if isinstance(clients, list) and len(clients) <= _MAX_CLIENTS:
        description[JobMetaKey.JOB_CLIENTS.value] = clients
    return description
