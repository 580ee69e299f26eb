"""What runs in a job at a site: it hands messages to the site's trainer, and answers back. It looks into neither."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvflare.apis.executor import Executor
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal

from fedmerge_peft.errors import FedMergeError
from fedmerge_peft.sites.config import ADDRESS
from fedmerge_peft.sites.exit_with_parent import end_with_parent
from fedmerge_peft.sites.flare.names import CONTENT, DEADLINE, ERROR
from fedmerge_peft.sites.flare.workarounds import say_messages_short
from fedmerge_peft.sites.site.connection import Link

if TYPE_CHECKING:
    from fedmerge_peft.sites.site.trainer import Trainer


class SiteExecutor(Executor):  # type: ignore[misc]
    """Carries messages to the site's long-lived trainer, or to one of its own where the site wants it so (``process: job``)."""

    def __init__(self) -> None:
        super().__init__()
        say_messages_short()
        end_with_parent()
        address = os.environ.get(ADDRESS)
        self._link = Link(address) if address else None
        self._trainer: Trainer | None = None

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        """The answer to a message, or why there is none."""
        end = time.monotonic() + float(shareable.get(DEADLINE, 0))
        answer: dict[str, Any]
        try:
            if self._link is not None:
                given_up = lambda: bool(abort_signal.triggered) or time.monotonic() > end  # noqa: E731
                answer = {CONTENT: self._link.ask(task_name, shareable[CONTENT], given_up)}
            else:
                answer = {CONTENT: self._own(fl_ctx).answer(shareable[CONTENT])}
        except FedMergeError as error:
            self.log_warning(fl_ctx, str(error))
            answer = {ERROR: str(error)}
        reply = Shareable()
        reply.update(answer)
        return reply

    def _kit(self, fl_ctx: FLContext) -> Path:
        """The site's kit: FLARE runs in it."""
        return Path(fl_ctx.get_engine().get_workspace().get_root_dir())

    def _own(self, fl_ctx: FLContext) -> Trainer:
        if self._trainer is None:
            from fedmerge_peft.sites.config import SETTINGS, SITE, SiteSettings
            from fedmerge_peft.sites.site.trainer import Trainer

            kit = self._kit(fl_ctx)
            said = os.environ.get(SETTINGS)
            settings = (
                SiteSettings.model_validate_json(said) if said else SiteSettings.read(kit / SITE)
            )
            self._trainer = Trainer(kit, fl_ctx.get_identity_name(), settings)
        return self._trainer
