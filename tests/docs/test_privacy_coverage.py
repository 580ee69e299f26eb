"""The table in docs/privacy.md says what leaves a client in each mode, on each kind of engine."""

import re
from pathlib import Path

import pytest
import torch

from fedmerge_peft import Callback, Recipe, federate
from fedmerge_peft.data import federate_data
from fedmerge_peft.engines.distributed import RankedEngine
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.federation.privacy_ledger import PrivacyLedger
from fedmerge_peft.sites.config import RECIPE_FILE, SITE_FILE, FederationFile, SiteSettings
from fedmerge_peft.sites.server.engine import RemoteEngine
from fedmerge_peft.sites.server.roster import Roster
from fedmerge_peft.sites.site.trainer import Trainer
from fedmerge_peft.sites.site_data import split_clients, write_site_data
from fedmerge_peft.strategies.differential_privacy import PrivateAggregator, epsilon_spent

PAGE = (Path(__file__).parents[2] / "docs" / "privacy.md").read_text()
TABLE = [
    [cell.strip().replace("`", "") for cell in line.strip("|").split("|")]
    for line in re.findall(
        r"^\|.*\|$", PAGE.partition("## Coverage by mode")[2].partition("\n## ")[0], re.M
    )
]
COLUMNS = [
    ("central", "simulated"),
    ("central", "sites"),
    ("local", "simulated"),
    ("local", "sites"),
]
CLIP = 0.25


class Sites:
    """Transport to the trainers of sites in this process."""

    def __init__(self, recipe, path):
        data = federate_data(recipe.data, recipe.task.label_column, recipe.seed)
        self.federation = FederationFile(
            project="test", host="localhost", port=1, sites=split_clients(data, 2)
        )
        self.trainers = {}
        for site, clients in self.federation.sites.items():
            kit = path / site
            kit.mkdir(parents=True)
            self.federation.write(kit)
            (kit / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
            write_site_data(data, clients, kit, {})
            self.trainers[site] = Trainer(kit, site, SiteSettings.read(kit / SITE_FILE))
        self.sites = list(self.trainers)

    def send_and_receive(self, requests, deadline):
        for site, queue in requests.items():
            for number, payload in queue:
                yield site, number, self.trainers[site].handle(payload())


def observed(mode, kind, path):
    """The column of the table, from a run with a baseline."""
    recipe = Recipe.load(
        "smoke",
        [
            "rounds=1",
            "strategy=fedavg",
            "baselines=[fedprox]",
            f"privacy={{mode: {mode}, clip: {CLIP}, noise: 2}}",
            "training.clients_per_batch=1",
            "training.learning_rate=auto",
            "training.epochs=auto",
        ],
    )
    sites = Sites(recipe, path) if kind == "sites" else None
    engine = (
        RemoteEngine.enroll(recipe, sites.federation, Roster(), sites)
        if sites
        else LocalEngine.from_recipe(recipe)
    )
    truth = federate_data(recipe.data, recipe.task.label_column, recipe.seed).clients
    sizes = {client.name: client.size for client in truth}
    replies, aggregators = [], []
    run = federate(
        recipe,
        path / "run",
        engine=engine,
        callbacks=[
            Callback(
                on_start=lambda federation, _: aggregators.append(federation.strategy.aggregator),
                on_client=replies.append,
            )
        ],
    )

    def shown(values):
        known = [value is not None and value != 0.0 for value in values]
        assert all(known) or not any(known)
        return "exact" if all(known) else "withheld"

    norms = torch.tensor([float(reply.delta.norm()) for reply in replies])
    sources = {record["noise"] for record in run.records}
    if mode == "central":
        assert isinstance(aggregators[0], PrivateAggregator)
        assert (aggregators[0].seed is None) == (sources == {"operating system"})
    ledger = PrivacyLedger(recipe, 2, simulated=engine.simulated)
    for _ in range(2):
        ledger.charge("fedavg", 1)
    poisson = recipe.replace(["clients={sampling: poisson, fraction: 0.5}"])
    ledgers = [PrivacyLedger(one, 1, simulated=False) for one in (poisson, recipe)]
    for one in ledgers:
        one.charge("fedavg", 1)
    sampled, whole = (one.epsilon for one in ledgers)
    final = run.summary["final"]["served"]
    counts = engine.label_counts()
    sent = [reply.size == sizes[engine.clients[reply.client].name] for reply in replies]
    decisions = run.decisions
    budgets = [trainer.release.budget for trainer in sites.trainers.values()] if sites else []
    return {
        "source of the noise": {"simulation": "the recipe's seed"}.get(*sources, *sources),
        "update, as it leaves the client": "clipped"
        if bool((norms <= CLIP * 1.001).all())
        else "noise",
        "training loss": shown([reply.train_loss for reply in replies]),
        "scores before and after training": shown(
            [scores for reply in replies for scores in (reply.served, reply.finetuned)]
        ),
        "scores after the last round": shown([final]),
        "time of a client": shown([reply.seconds for reply in replies]),
        "number of examples": "exact" if all(sent) else "withheld",
        "label counts": shown([counts]),
        "names of clients and labels": shown([list(sizes) == run.client_names, run.task["labels"]]),
        "test of learning rates": "some" if "trials" in decisions["learning_rate"] else "none",
        "sizes in training.epochs: auto": "unused"
        if "without the clients' sizes" in decisions["epochs"]["reason"]
        else "used",
        "best round": "none" if run.summary["best"] is None else "kept",
        "baselines in ε": "counted"
        if run.summary["privacy"]["epsilon"] == epsilon_spent(recipe.privacy, 2)
        else "left out",
        "effect of clients.sampling: poisson on ε": "smaller" if sampled < whole else "none",
        "repeated round in ε": {1: "same release", 2: "counted"}[
            round(ledger.epsilon / epsilon_spent(recipe.privacy, 1) > 1) + 1
        ],
        "budget at the client": "kept"
        if budgets and all(budget.epsilon is not None for budget in budgets)
        else "none",
    }


@pytest.mark.parametrize("number", range(4), ids=["-".join(column) for column in COLUMNS])
def test_a_column_of_the_table_is_what_a_run_shows(number, tmp_path):
    mode, kind = COLUMNS[number]
    header, _, *rows = TABLE
    assert header[1 + number] == f"{mode}, {kind}"
    assert {row[0]: row[1 + number] for row in rows} == observed(mode, kind, tmp_path)


def test_ranks_simulate_too():
    assert RankedEngine.simulated
    assert LocalEngine.simulated
    assert not RemoteEngine.simulated
