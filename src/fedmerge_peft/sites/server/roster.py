"""What the server knows of the clients: names from the beginning, numbers of examples and of labels once their site has told them."""

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

ROSTER = "roster.json"
_PARTS = ("train", "validation", "test")


@dataclass
class Roster:
    """Kept in the server's kit, so that it is the same after a restart."""

    labels: list[str] | None = None
    """The federation's, in the order of their ids; fixed by the sites of the first job."""
    format: str | None = None
    """How texts are laid out."""
    columns: list[str] = field(default_factory=list)
    clients: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name: ``group``, ``train``, ``validation``, ``test``, and ``counts`` by label."""

    @classmethod
    def read(cls, kit: Path) -> Roster:
        """The roster of a server's kit, empty before the first job. Raises ``FederateError``."""
        said = read_json(kit / ROSTER)
        try:
            return cls() if said is None else cls(**said)
        except TypeError as error:
            raise FederateError(f"{kit / ROSTER}: not written by this version ({error})") from error

    def write(self, kit: Path) -> None:
        """Raises ``RunError``."""
        write_json(kit / ROSTER, asdict(self))

    def settle(self, told: Mapping[str, Mapping[str, Any]], recipe: Recipe) -> dict[str, str]:
        """Agree on labels and format from what sites told, unless that was done before. Why sites are left out, by site.

        Raises:
            FederateError: The sites have more labels than the recipe says.
        """
        wrong: dict[str, str] = {}
        texts = recipe.task.name == "causal-lm"
        if not self.columns and told:
            first = next(iter(told.values()))
            self.columns, self.format = list(first["columns"]), first["format"]
            if not texts:
                self.labels = agree_on_labels(
                    [each["labels"] for each in told.values()],
                    getattr(recipe.task, "num_labels", None),
                )
        for site, each in told.items():
            if texts and each["format"] != self.format:
                wrong[site] = (
                    f"its texts are in the format {each['format']}, and the federation's in {self.format}"
                )
            elif not texts and (unknown := sorted(set(each["labels"]) - set(self.labels or ()))):
                wrong[site] = (
                    f"its data have labels that the federation does not know: {', '.join(unknown)}"
                )
        return wrong

    def enter(
        self, clients: Sequence[Mapping[str, Any]], counts: Sequence[Sequence[int]] | None
    ) -> None:
        """Enter a site's clients. Raises ``WireError`` for those that came with other numbers before."""
        for position, each in enumerate(clients):
            entry = {key: each[key] for key in ("group", "train", "validation", "test")}
            entry["counts"] = None if counts is None else list(counts[position])
            known = self.clients.setdefault(str(each["name"]), entry)
            if known != entry:
                was, now = (
                    ", ".join(f"{said[part]} {part}" for part in _PARTS) for said in (known, entry)
                )
                raise WireError(
                    f"client {each['name']} was entered with {was} examples, and now has {now}, or others of a label; "
                    "data may not change within a federation"
                )


def told_by(facts: Mapping[str, Any], clients: Sequence[str], site: str) -> dict[str, Any]:
    """What a site told when it enrolled, checked. Raises ``WireError``."""
    try:
        told: list[dict[str, Any]] = [
            {
                "name": str(each["name"]),
                "group": str(each["group"]),
                **{key: _count(each[key]) for key in _PARTS},
            }
            for each in facts["clients"]
        ]
        labels, layout = facts["labels"], facts["format"]
        columns = [str(name) for name in facts["columns"]]
        labels = None if labels is None else [str(label) for label in labels]
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(
            f"it told of its data in no form that this version knows ({type(error).__name__})"
        ) from error
    if [each["name"] for each in told] != list(clients) or any(each["train"] < 1 for each in told):
        raise WireError(f"it told of other clients than the federation knows of {site}")
    return {
        "clients": told,
        "labels": labels,
        "format": None if layout is None else str(layout),
        "columns": columns,
    }


def counts_of(
    facts: Mapping[str, Any], clients: Sequence[Mapping[str, Any]], labels: Sequence[str] | None
) -> list[list[int]] | None:
    """How many training examples of each label a site's clients have, checked. Raises ``WireError``."""
    if not labels:
        return None
    try:
        counts = [[_count(number) for number in row] for row in facts["counts"]]
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(
            f"it counted its labels in no form that this version knows ({type(error).__name__})"
        ) from error
    if [sum(row) for row in counts] != [each["train"] for each in clients] or any(
        len(row) != len(labels) for row in counts
    ):
        raise WireError("its counts of labels do not add up to its examples")
    return counts


def reconcile(run: Path, federation: Federation, roster: Roster) -> None:
    """Write into a run directory what sites that came late have told of clients that were names only. Raises ``FederateError``."""
    clients, labels = read_json(run / "clients.json"), read_json(run / "labels.json")
    if clients is None:
        return
    for entry in clients:
        known = roster.clients.get(entry["name"])
        if known is not None and entry["train"] == 0:
            entry |= {key: known[key] for key in ("group", "train", "validation", "test")}
            if labels is not None:
                labels["counts"][federation.clients.index(entry["name"])] = known["counts"]
    write_json(run / "clients.json", clients)
    if labels is not None:
        write_json(run / "labels.json", labels)


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value
