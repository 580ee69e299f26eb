"""The server's record of the clients: names, and the counts that their sites have reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedmerge_peft.errors import FederateError, WireError
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.sites.config import Federation, read_json
from fedmerge_peft.sites.site_data import agree_on_labels
from fedmerge_peft.util.files import write_json

ROSTER_FILE = "roster.json"
_SPLITS = ("train", "validation", "test")


@dataclass
class Roster:
    """Clients and labels of the federation, stored in the server's kit across restarts."""

    labels: list[str] | None = None
    """Names of the labels in the order of their ids; fixed by the sites of the first job."""
    format: str | None = None
    """Text format of the federation."""
    columns: list[str] = field(default_factory=list)
    """Columns of the data."""
    clients: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Entries by client name: ``group``; the numbers of examples ``train``, ``validation`` and
    ``test``; and ``counts``, the training examples by label."""

    @classmethod
    def read(cls, kit: Path) -> Roster:
        """Read a server kit's roster; empty before the first job. Raises ``FederateError``."""
        document = read_json(kit / ROSTER_FILE)
        try:
            return cls() if document is None else cls(**document)
        except TypeError as error:
            raise FederateError(
                f"{kit / ROSTER_FILE}: written by another version ({error})"
            ) from error

    def write(self, kit: Path) -> None:
        """Write the roster into the server's kit. Raises ``RunError``."""
        write_json(kit / ROSTER_FILE, asdict(self))

    def agree_on_format(
        self, summaries: Mapping[str, Mapping[str, Any]], recipe: Recipe
    ) -> dict[str, str]:
        """Fix labels and text format in the first job; afterwards check the sites against them.

        Args:
            summaries: The parsed summary of each site.
            recipe: Recipe of the federation.

        Returns:
            The reason, by site, for each site that does not match.

        Raises:
            FederateError: The sites have more labels than the recipe.
        """
        refused: dict[str, str] = {}
        texts = recipe.task.label_column is None
        if not self.columns and summaries:
            first = next(iter(summaries.values()))
            self.columns, self.format = list(first["columns"]), first["format"]
            if not texts:
                self.labels = agree_on_labels(
                    [summary["labels"] for summary in summaries.values()],
                    getattr(recipe.task, "num_labels", None),
                )
        for site, summary in summaries.items():
            if texts and summary["format"] != self.format:
                refused[site] = (
                    f"its texts have the format {summary['format']}, "
                    f"and the federation uses {self.format}"
                )
            elif not texts and (unknown := sorted(set(summary["labels"]) - set(self.labels or ()))):
                refused[site] = (
                    f"its data have labels that the federation does not have: {', '.join(unknown)}"
                )
        return refused

    def add_clients(
        self, clients: Sequence[Mapping[str, Any]], counts: Sequence[Sequence[int]] | None
    ) -> None:
        """Add a site's clients. Raises ``WireError`` if a client has changed its counts."""
        for position, client in enumerate(clients):
            entry = {key: client[key] for key in ("group", *_SPLITS)}
            entry["counts"] = None if counts is None else list(counts[position])
            known = self.clients.setdefault(str(client["name"]), entry)
            if known != entry:
                before, now = (
                    ", ".join(f"{values[split]} {split}" for split in _SPLITS)
                    for values in (known, entry)
                )
                raise WireError(
                    f"client {client['name']} enrolled with {before} examples, but now has {now}, "
                    "or different label counts; data must not change within a federation"
                )


def parse_site_summary(
    fields: Mapping[str, Any], clients: Sequence[str], site: str
) -> dict[str, Any]:
    """Check and return the ``SiteSummary`` in a message.

    Args:
        fields: Fields of the ``enrolled`` message.
        clients: Names of the site's clients in the federation.
        site: Name of the site.

    Raises:
        WireError: The summary is malformed, or describes other clients.
    """
    try:
        entries: list[dict[str, Any]] = [
            {
                "name": str(entry["name"]),
                "group": str(entry["group"]),
                **{split: _count(entry[split]) for split in _SPLITS},
            }
            for entry in fields["clients"]
        ]
        labels, text_format = fields["labels"], fields["format"]
        columns = [str(name) for name in fields["columns"]]
        labels = None if labels is None else [str(label) for label in labels]
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"its summary of the data is malformed ({type(error).__name__})") from error
    if [entry["name"] for entry in entries] != list(clients):
        raise WireError(f"the clients in its summary differ from those of the federation at {site}")
    if any(entry["train"] < 1 for entry in entries):
        raise WireError("its summary has a client without training examples")
    return {
        "clients": entries,
        "labels": labels,
        "format": None if text_format is None else str(text_format),
        "columns": columns,
    }


def parse_label_counts(
    fields: Mapping[str, Any], clients: Sequence[Mapping[str, Any]], labels: Sequence[str] | None
) -> list[list[int]] | None:
    """Check and return the training examples of each label, clients × labels.

    Args:
        fields: Fields of the ``opened`` message.
        clients: The clients in the site's summary.
        labels: The federation's labels.

    Returns:
        The counts; None for a task without labels.

    Raises:
        WireError: The counts are malformed, or do not sum to the training examples.
    """
    if not labels:
        return None
    try:
        counts = [[_count(number) for number in row] for row in fields["counts"]]
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"its counts of labels are malformed ({type(error).__name__})") from error
    if [sum(row) for row in counts] != [client["train"] for client in clients] or any(
        len(row) != len(labels) for row in counts
    ):
        raise WireError("its counts of labels do not add up to its examples")
    return counts


def update_run_clients(run: Path, federation: Federation, roster: Roster) -> None:
    """Enter the counts of sites that joined late into a run directory.

    Raises:
        FederateError: A file of the run directory cannot be read.
    """
    clients, labels = read_json(run / "clients.json"), read_json(run / "labels.json")
    if clients is None:
        return
    for entry in clients:
        known = roster.clients.get(entry["name"])
        if known is not None and entry["train"] == 0:
            entry |= {key: known[key] for key in ("group", *_SPLITS)}
            if labels is not None:
                labels["counts"][federation.clients.index(entry["name"])] = known["counts"]
    write_json(run / "clients.json", clients)
    if labels is not None:
        write_json(run / "labels.json", labels)


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value
