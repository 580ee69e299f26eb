"""A site's part of a job: forwards messages to the site's trainer and returns its replies."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvflare.apis.executor import Executor
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal

from fedmerge_peft.errors import FederateError, FedMergeError
from fedmerge_peft.sites.config import ADDRESS_VARIABLE
from fedmerge_peft.sites.flare.names import DEADLINE, ERROR, PAYLOAD
from fedmerge_peft.sites.flare.workarounds import disable_payload_repr
from fedmerge_peft.sites.site.connection import TrainerConnection
from fedmerge_peft.util.exit_with_parent import exit_with_parent

if TYPE_CHECKING:
    from fedmerge_peft.sites.site.trainer import Trainer


class SiteExecutor(Executor):  # type: ignore[misc]
    """Executor that forwards messages to the site's trainer process.

    With ``process: job``, it creates a trainer in the process of the job.
    """

    def __init__(self) -> None:
        super().__init__()
        disable_payload_repr()
        exit_with_parent()
        address = os.environ.get(ADDRESS_VARIABLE)
        self._connection = TrainerConnection(address) if address else None
        self._trainer: Trainer | None = None

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        """Return the trainer's reply to a message, or the reason for its absence."""
        end = time.monotonic() + float(shareable.get(DEADLINE, 0))

        def canceled() -> bool:
            return bool(abort_signal.triggered) or time.monotonic() > end

        result: dict[str, Any]
        try:
            payload = shareable[PAYLOAD]
            if self._connection is not None:
                result = {PAYLOAD: self._connection.request(task_name, payload, canceled)}
            else:
                result = {PAYLOAD: self._job_trainer(fl_ctx).handle(payload)}
        except FedMergeError as error:
            self.log_warning(fl_ctx, str(error))
            result = {ERROR: str(error)}
        reply = Shareable()
        reply.update(result)
        return reply

    def _kit(self, fl_ctx: FLContext) -> Path:
        """Return the site's kit, which is FLARE's workspace."""
        return Path(fl_ctx.get_engine().get_workspace().get_root_dir())

    def _job_trainer(self, fl_ctx: FLContext) -> Trainer:
        """Return the trainer of this process; create it for the first message.

        Raises:
            FederateError: The trainer cannot be created. Only the site's log has the cause.
        """
        if self._trainer is None:
            from fedmerge_peft.sites.config import SETTINGS_VARIABLE, SITE_FILE, SiteSettings
            from fedmerge_peft.sites.site.trainer import Trainer

            kit = self._kit(fl_ctx)
            document = os.environ.get(SETTINGS_VARIABLE)
            try:
                settings = (
                    SiteSettings.model_validate_json(document)
                    if document
                    else SiteSettings.read(kit / SITE_FILE)
                )
                self._trainer = Trainer(kit, fl_ctx.get_identity_name(), settings)
            except FedMergeError as error:  # its text may contain examples or counts
                self.log_error(fl_ctx, f"the trainer does not start: {error}")
                raise FederateError("the trainer does not start; see the site's log") from error
        return self._trainer
