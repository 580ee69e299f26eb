"""Start of a job at the server: agree on labels and text format, load the model, check replies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from fedmerge_peft.errors import DataError, FederateError, WireError
from fedmerge_peft.models.backbone import Backbone, load_backbone
from fedmerge_peft.models.pretrained import model_folder
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.sites.fields import Enrolled, Failure, read_fields
from fedmerge_peft.sites.server.roster import Roster
from fedmerge_peft.sites.server.transport import Transport
from fedmerge_peft.sites.wire import Message
from fedmerge_peft.tasks import make_task, task_type
from fedmerge_peft.tasks.base import Task
from fedmerge_peft.util.ranges import MAX_REASON
from fedmerge_peft.util.text import printable_lines, shortened


def agree_and_load(
    recipe: Recipe, roster: Roster, summaries: Mapping[str, Enrolled], absent: dict[str, str]
) -> tuple[Task, Backbone]:
    """Agree on labels and text format with the sites, and load task and model.

    A site whose labels or text format do not match those of the federation is added to ``absent``,
    with the reason. In the first job, a site whose columns the task refuses is added too, so that
    it does not end the job.

    Raises:
        FederateError: No site can take part; or, in the first job, all examples have one label.
        FedMergeError: The server cannot load task or model.
    """
    first = not roster.columns
    while True:
        present = {site: parsed for site, parsed in summaries.items() if site not in absent}
        absent |= roster.agree_on_format(present, recipe)
        require_sites([site for site in present if site not in absent], absent)
        try:
            return _load(recipe, roster)
        except DataError as error:
            refused = [site for site in present if present[site].columns == roster.columns]
            if not first or not refused:
                raise
            absent |= dict.fromkeys(refused, str(error))
            roster.labels, roster.format, roster.columns = None, None, []


def _load(recipe: Recipe, roster: Roster) -> tuple[Task, Backbone]:
    """Load task and model on the CPU; the task is built from a table without real examples."""
    recipe = recipe.model_copy(update={"task": recipe.task.with_format(roster.format)})
    with ExitStack() as stack:
        folder = model_folder(
            recipe.backbone, Path(stack.enter_context(TemporaryDirectory(prefix="fedmerge-")))
        )
        table = task_type(recipe.task).placeholder(recipe.task, roster.labels or (), roster.columns)
        task = make_task(recipe, table, folder)
        return task, load_backbone(
            recipe.backbone, recipe.lora, task, folder, torch.device("cpu"), recipe.seed
        )


def broadcast(
    transport: Transport,
    sites: Sequence[str],
    message: Message,
    deadline: float,
    absent: dict[str, str],
) -> list[tuple[str, Message]]:
    """Send an ``enroll`` or ``open`` message to ``sites``; return each valid reply with its site.

    A site is added to ``absent``, with the reason, if it sends an error, an invalid reply, or no
    reply within ``deadline`` seconds.
    """
    payload = message.to_bytes()
    expected = {"enroll": "enrolled", "open": "opened"}[message.kind]
    replies: list[tuple[str, Message]] = []
    for site, _, reply in transport.send_and_receive(
        {site: [(0, lambda: payload)] for site in sites}, deadline
    ):
        with failures_to(absent, site):
            replies.append((site, parse_reply(reply, expected)))
    return replies


def parse_reply(reply: bytes | str, kind: str) -> Message:
    """Parse a reply of the transport.

    Args:
        reply: The bytes of a message, or the reason for its absence.
        kind: The expected kind.

    Raises:
        FederateError: There is no reply, or the site reports an error.
        WireError: The bytes are not a message of this kind.
    """
    if isinstance(reply, str):
        raise FederateError(_reason(reply))
    message = Message.from_bytes(reply)
    if message.kind == "error":
        raise FederateError(_reason(read_fields(Failure, message).error))
    if message.kind != kind:
        raise WireError(
            f"the site sent a message of kind {message.kind!r}, expected {kind!r}; install the "
            "same version on the server and all sites"
        )
    return message


def _reason(text: str) -> str:
    """Shorten a site's reason for a failure, and escape control characters except line feeds."""
    return printable_lines(shortened(text, MAX_REASON))


@contextmanager
def failures_to(absent: dict[str, str], site: str) -> Iterator[None]:
    """Catch a ``FederateError`` of the block and record it as the reason for the site's absence."""
    try:
        yield
    except FederateError as error:
        absent[site] = str(error)


def require_sites(present: Sequence[str], absent: Mapping[str, str]) -> None:
    """Raise ``FederateError``, with the reason of each site, if no site is present."""
    if not present:
        reasons = "\n".join(f"  {site}: {reason}" for site, reason in absent.items())
        raise FederateError(f"no site can take part:\n{reasons}")
