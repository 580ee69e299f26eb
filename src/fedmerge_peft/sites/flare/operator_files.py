"""Files that pass between the operator and the server: jobs to submit, and the outcome of a job.

By default, the server chooses the function that a command runs in NVIDIA FLARE's admin client, the
names of the files that a download writes, and the folder that the client then moves to the place of
the result. A hostile server could thus write, upload and remove any file of the operator. Here, the
server chooses none of these. Of the server's commands that transfer files, the client keeps only
one, which uploads the job that the operator has written. A download writes one file in a temporary
folder, from which one document is read.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal
from zipfile import BadZipFile, ZipFile

from nvflare.apis.fl_constant import AdminCommandNames
from nvflare.apis.storage import WORKSPACE_ZIP
from nvflare.fuel.flare_api.api_spec import NoConnection
from nvflare.fuel.flare_api.flare_api import Session
from nvflare.fuel.hci.client.api import APIStatus, ResultKey
from nvflare.fuel.hci.client.file_transfer import FileTransferModule
from nvflare.fuel.hci.file_transfer_defs import PUSH_FOLDER_FQN
from nvflare.fuel.hci.proto import MetaKey
from pydantic import ValidationError

from fedmerge_peft.errors import WireError
from fedmerge_peft.recipe.section import Section
from fedmerge_peft.sites.flare.names import OUTCOME_FILE
from fedmerge_peft.util.ranges import Count, Text, first_fault
from fedmerge_peft.util.text import printable, shortened

_MAX_OUTCOME = 2**24
"""Largest number of bytes of ``outcome.json``."""
_MALFORMED = (ValueError, TypeError, LookupError, AttributeError, NotImplementedError, BadZipFile)
"""Exceptions that a malformed reply or archive of the server causes."""
_LOST = (APIStatus.ERROR_SERVER_CONNECTION, APIStatus.ERROR_INACTIVE_SESSION)
"""Statuses of failed requests that may succeed in another session."""
_for_any_command = FileTransferModule.generate_module_spec


class JobOutcome(Section):
    """Content of ``outcome.json``, which a job writes at the server."""

    state: Literal["ended", "paused", "stopped", "failed"]
    rounds: Count
    total: Count
    error: Text | None
    absent: dict[str, Text]
    adapters: dict[str, Text | None]
    events: list[Text]


class JobStatus(Section):
    """Reply of a running job to a command of the operator."""

    sites: list[Text] = []
    events: list[Text] = []
    requested: Text | None = None


def restrict_file_commands() -> None:
    """Disable the server's commands that transfer files, except the upload of a job."""
    FileTransferModule.generate_module_spec = _for_submissions


def _for_submissions(module: FileTransferModule, command: Any) -> Any:
    submission = (AdminCommandNames.SUBMIT_JOB, PUSH_FOLDER_FQN)
    if (command.name, command.client_cmd) != submission:
        return None
    return _for_any_command(module, command)


def download_outcome(session: Session, job: str) -> dict[str, Any] | None:
    """Download a job's outcome; return None if the job has written none.

    Raises:
        WireError: The server sends a malformed reply, archive or outcome.
        NoConnection: FLARE's exception for a lost connection or session.
    """
    with TemporaryDirectory(prefix="fedmerge-") as scratch:
        archive = Path(scratch) / WORKSPACE_ZIP
        # ``session`` cannot download: ``restrict_file_commands`` has disabled its command.
        reply = session.api.server_execute(f"{AdminCommandNames.DOWNLOAD_JOB} {job}")
        if reply.get(ResultKey.STATUS) in _LOST:
            raise NoConnection(f"the files of job {job} did not arrive")
        try:
            meta = reply[ResultKey.META]
            for name, reference in meta[MetaKey.FILES]:
                if Path(name).name == WORKSPACE_ZIP:
                    source = meta[MetaKey.SOURCE_FQCN]
                    session.api.download_file(source, reference, str(archive))
            content = _outcome_in(archive)
            return None if content is None else JobOutcome.model_validate_json(content).model_dump()
        except ValidationError as invalid:
            raise WireError(
                f"{OUTCOME_FILE} of job {job} is malformed: {first_fault(invalid)}; use the same "
                "version of fedmerge-peft as the server"
            ) from None
        except (*_MALFORMED, OSError) as error:
            reason = printable(shortened(f"{type(error).__name__}: {error}", 200))
            raise WireError(
                f"the files of job {job} are missing or not readable ({reason}); see "
                "log.txt in the server's kit"
            ) from error


def _outcome_in(archive: Path) -> bytes | None:
    """Read a job's outcome from its archive, which is not unpacked.

    Return None if the archive does not exist or contains no outcome.

    Raises ``ValueError`` if the outcome is larger than ``_MAX_OUTCOME``.
    """
    if not archive.exists():
        return None
    with ZipFile(archive) as files:
        name = next((name for name in files.namelist() if Path(name).name == OUTCOME_FILE), None)
        if name is None:
            return None
        with files.open(name) as file:
            content = file.read(_MAX_OUTCOME + 1)
    if len(content) > _MAX_OUTCOME:
        raise ValueError(f"{OUTCOME_FILE} has more than {_MAX_OUTCOME} bytes")
    return content


def read_status(reply: Any) -> dict[str, Any]:
    """Check and return a job's reply to a command. Raises ``WireError`` if it is malformed."""
    try:
        return JobStatus.model_validate(reply).model_dump()
    except ValidationError as invalid:
        raise WireError(
            f"the job's status is malformed: {first_fault(invalid)}; use the same version of "
            "fedmerge-peft as the server"
        ) from None
