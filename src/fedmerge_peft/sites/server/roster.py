"""The server's record of a federation: clients and their sizes, labels, columns, text format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic needs it before Python 3.12

from fedmerge_peft.data.columns import join_values
from fedmerge_peft.errors import FederateError, WireError
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.runs import documents
from fedmerge_peft.sites.config import FederationFile, read_json
from fedmerge_peft.sites.fields import (
    MAX_LABELS,
    Enrolled,
    EnrolledClient,
    LabelCounts,
    Labels,
    Opened,
    TextFormat,
    read_fields,
)
from fedmerge_peft.sites.site_data import agree_on_labels
from fedmerge_peft.sites.wire import Message
from fedmerge_peft.tasks import task_type
from fedmerge_peft.util import checked
from fedmerge_peft.util.files import write_json
from fedmerge_peft.util.ranges import Count, Name, first_fault

ROSTER_FILE = "roster.json"
_SPLITS = ("train", "validation", "test")


class RosterEntry(TypedDict):
    """A client in the roster."""

    group: Name
    train: Count
    validation: Count
    test: Count
    counts: LabelCounts | None
    """Number of training examples with each label; None with ``privacy.mode: local``, or if the
    task counts no labels."""


NOT_ENROLLED = RosterEntry(group="", train=0, validation=0, test=0, counts=None)
"""Entry of a client whose site has not enrolled yet."""


@dataclass
class Roster:
    """Clients, labels, columns and text format of the federation.

    A file in the server's kit preserves the roster across restarts.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    labels: Labels | None = None
    """Names of the labels in the order of their ids; fixed by the sites of the first job. None
    before the first job, and if the task has no labels."""
    format: TextFormat | None = None
    """Text format of the federation. None before the first job, and if the task has no formats."""
    columns: Annotated[list[Name], Field(max_length=1000)] = field(default_factory=list)
    """Column names of the data; empty before the first job."""
    clients: dict[Name, RosterEntry] = field(default_factory=dict)
    """Entries of the clients whose sites have enrolled, by client name."""

    @classmethod
    def read(cls, kit: Path) -> Roster:
        """Read the roster of a server's kit; return an empty roster before the first job.

        Raises ``FederateError`` if the file is damaged.
        """
        document = read_json(kit / ROSTER_FILE)
        try:
            return cls() if document is None else TypeAdapter(cls).validate_python(document)
        except ValidationError as invalid:
            raise FederateError(
                f"{kit / ROSTER_FILE}: damaged, or written by another version "
                f"({first_fault(invalid)}); restore it from a backup, or install that version"
            ) from None

    def write(self, kit: Path) -> None:
        """Write the roster into the server's kit. Raises ``RunError`` if this fails."""
        write_json(kit / ROSTER_FILE, asdict(self))

    def agree_on_format(self, summaries: Mapping[str, Enrolled], recipe: Recipe) -> dict[str, str]:
        """Check the labels and the format of each site; columns are not checked.

        In the first job, choose the federation's columns, labels and format before the check:
        the most frequent columns, the most frequent format, and the labels of ``agree_on_labels``.
        Sites that ``sites_beyond`` excludes do not contribute labels. In a tie, the site that comes
        first in ``summaries`` decides.

        Args:
            summaries: The summary of each site.
            recipe: Recipe of the federation.

        Returns:
            The reason for each site that does not match, by site.

        Raises:
            FederateError: In the first job, the task has classes and all examples the same one.
        """
        task = recipe.task
        refused: dict[str, str] = {}
        for site, summary in summaries.items():
            present = summary.labels is not None, summary.format is not None
            if present != (task.has_labels, task.has_formats):
                labels = "labels" if task.has_labels else "no labels"
                refused[site] = (
                    f"its summary of the data must have {labels} and "
                    f"{'a' if task.has_formats else 'no'} text format"
                )
        fitting = {site: summary for site, summary in summaries.items() if site not in refused}
        if not self.columns and fitting:
            columns = _most_frequent([tuple(summary.columns) for summary in fitting.values()])
            self.columns = list(columns)
            self.format = _most_frequent([summary.format for summary in fitting.values()])
            if task.has_labels:
                number = recipe.task.label_limit
                named = {site: summary.labels or [] for site, summary in fitting.items()}
                refused |= (excess := sites_beyond(named, number))
                kept = [labels for site, labels in named.items() if site not in excess]
                one_each = task_type(task).names_classes
                self.labels = agree_on_labels(kept, number, one_each=one_each) if kept else None
        for site, summary in fitting.items():
            if site in refused:
                continue
            if summary.format != self.format:
                refused[site] = (
                    f"its texts have the format {summary.format}, "
                    f"and the federation uses {self.format}"
                )
            elif unknown := sorted(set(summary.labels or ()) - set(self.labels or ())):
                refused[site] = (
                    "its data have labels that the federation does not have: "
                    f"{join_values(unknown)}"
                )
        return refused

    def add_clients(
        self, clients: Sequence[EnrolledClient], counts: Sequence[Sequence[int]] | None
    ) -> None:
        """Add a site's clients.

        Args:
            clients: The clients in the site's summary.
            counts: The number of training examples with each label, clients × labels; None if
                the task counts no labels, or with ``privacy.mode: local``.

        Raises:
            WireError: A client is known, and its entry differs; no client was added.
        """
        added: dict[str, RosterEntry] = {}
        for position, client in enumerate(clients):
            entry = RosterEntry(
                group=client.group,
                train=client.train,
                validation=client.validation,
                test=client.test,
                counts=None if counts is None else list(counts[position]),
            )
            known = self.clients.get(client.name, entry)
            if known != entry:
                raise WireError(
                    f"the data of client {client.name} have changed since an earlier job: "
                    f"{'; '.join(_differences(known, entry))}; restore the data, or start a new "
                    "federation with new kits (federate prepare)"
                )
            added[client.name] = entry
        self.clients |= added


def _differences(known: RosterEntry, entry: RosterEntry) -> list[str]:
    """Describe the fields in which two entries of a client differ.

    An example is ``48 train examples, now 47``.
    """
    differences = [
        f"{known[part]} {part} examples, now {entry[part]}"
        for part in ("train", "validation", "test")
        if known[part] != entry[part]
    ]
    if known["group"] != entry["group"]:
        differences.append(f"group {known['group']}, now {entry['group']}")
    if known["counts"] != entry["counts"]:
        differences.append("other label counts")
    return differences


T = TypeVar("T")


def _most_frequent(values: Sequence[T]) -> T:
    """Return the most frequent value; of equally frequent values, the first."""
    return Counter(values).most_common(1)[0][0]


def sites_beyond(labels: Mapping[str, Sequence[str]], number: int | None) -> dict[str, str]:
    """Exclude sites until the remaining sites together have no more labels than the limit.

    Each step excludes the site with the most labels that occur at no other remaining site. Of
    several such sites, it excludes the one with the most labels.

    Args:
        labels: Names of the labels of each site.
        number: ``task.num_labels``, the limit. If it is None, the limit is ``MAX_LABELS``.

    Returns:
        The reason for each excluded site, by site.
    """
    kept = {site: set(names) for site, names in labels.items()}
    limit = number or MAX_LABELS
    reasons: dict[str, str] = {}
    while (total := len(set().union(*kept.values()))) > limit:
        holders = Counter(name for names in kept.values() for name in names)
        alone = {site: sum(holders[name] == 1 for name in names) for site, names in kept.items()}
        site = max(kept, key=lambda site: (alone[site], len(kept[site])))
        key = "task.num_labels" if number else "the limit without task.num_labels"
        reasons[site] = (
            f"with its data, the sites have {total} labels, but {key} is {limit}; "
            f"{alone[site]} of the {len(kept[site])} labels of its data occur at no other site"
        )
        del kept[site]
    return reasons


def parse_site_summary(message: Message, clients: Sequence[str], site: str) -> Enrolled:
    """Check and return a site's summary in a message.

    Args:
        message: A message of kind ``enrolled``.
        clients: Names of the site's clients in the federation.
        site: Name of the site.

    Raises:
        WireError: A field is out of range, or the summary describes other clients.
    """
    summary = read_fields(Enrolled, message)
    if [client.name for client in summary.clients] != list(clients):
        raise WireError(
            f"its clients differ from the federation's clients at {site}; use kits of one "
            "`federate prepare` on the server and all sites"
        )
    return summary


def parse_label_counts(
    message: Message,
    clients: Sequence[EnrolledClient],
    labels: Sequence[str] | None,
    *,
    one_each: bool,
) -> list[list[int]] | None:
    """Check and return the number of training examples with each label, clients × labels.

    Args:
        message: A message of kind ``opened``.
        clients: The clients in the site's summary.
        labels: The federation's labels; None if the task counts no labels.
        one_each: True if each example has exactly one label; False if it may have any number.

    Returns:
        The counts, or None if there are no labels.

    Raises:
        WireError: A field is out of range, or the counts do not fit the training examples.
    """
    counts = read_fields(Opened, message).counts
    if not labels:
        return None
    counts = counts or []
    complete = len(counts) == len(clients) and all(len(row) == len(labels) for row in counts)
    if not complete or not all(
        sum(row) == client.train if one_each else max(row) <= client.train
        for row, client in zip(counts, clients, strict=True)
    ):
        raise WireError(
            "its counts of labels do not fit its examples; install the same version on the server "
            "and all sites"
        )
    return counts


def update_run_clients(run: Path, federation: FederationFile, roster: Roster) -> None:
    """Write groups and numbers of examples of sites that joined late into a run directory.

    The function does nothing if the run has not started.

    Raises:
        RunError: A file of the run directory is damaged or cannot be written.
    """
    if not (run / "clients.json").is_file():
        return
    clients = documents.read(run / "clients.json")
    labels_path = run / "labels.json"
    labels = documents.read(labels_path) if labels_path.is_file() else None
    for entry in clients["clients"]:
        known = roster.clients.get(entry["name"])
        if known is not None and entry["train"] == 0:
            entry |= {key: known[key] for key in ("group", *_SPLITS)}  # type: ignore[literal-required]
            if labels is not None:
                labels["counts"][federation.clients.index(entry["name"])] = known["counts"]
    checked.write_document(run / "clients.json", clients)
    if labels is not None:
        checked.write_document(labels_path, labels)
