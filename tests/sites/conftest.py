"""Federations across sites, with trainers in this process or with processes of their own."""

from pathlib import Path

import pytest

from fedmerge_peft.data import federate_data
from sites.processes import FederationProcesses


class InProcessTransport:
    """Transport to trainers in this process; ``alter(site, payload, reply)`` changes replies."""

    def __init__(self, trainers, alter=None):
        self.trainers = trainers
        self.alter = alter or (lambda site, payload, reply: reply)
        self.sent = []

    @property
    def sites(self):
        return list(self.trainers)

    def send_and_receive(self, requests, deadline):
        for site, queue in requests.items():
            for number, make_payload in queue:
                payload = make_payload()
                self.sent.append((site, payload))
                reply = self.trainers[site].handle(payload)
                yield site, number, self.alter(site, payload, reply)


@pytest.fixture
def federation_of(tmp_path):
    """``federation_of(recipe, 3)``: a server's kit, and three trainers that share the clients."""
    from fedmerge_peft.sites.config import RECIPE_FILE, SITE_FILE, FederationFile, SiteSettings
    from fedmerge_peft.sites.site.trainer import Trainer
    from fedmerge_peft.sites.site_data import split_clients, write_site_data

    def make(recipe, sites, *, settings=None, name="federation", **options):
        recipe = recipe.replace(["training.clients_per_batch=1"])
        data = federate_data(recipe.data, getattr(recipe.task, "label", None), recipe.seed)
        federation = FederationFile(
            project="test",
            host="localhost",
            port=1,
            sites=split_clients(data, sites),
            **{"deadline": 60, **options},
        )
        trainers = {}
        for kit in ("server", *federation.sites):
            folder: Path = tmp_path / name / kit
            folder.mkdir(parents=True)
            federation.write(folder)
            (folder / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")
            if kit != "server":
                write_site_data(data, federation.sites[kit], folder, (settings or {}).get(kit, {}))
                trainers[kit] = Trainer(folder, kit, SiteSettings.read(folder / SITE_FILE))
        return tmp_path / name / "server", trainers

    return make


@pytest.fixture
def connect():
    """``connect(trainers)``: a transport to these trainers."""
    return InProcessTransport


@pytest.fixture
def one_thread(monkeypatch):
    """Processes of one thread each, and a short grace period for lost sites."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("NVFLARE_DEAD_CLIENT_GRACE_PERIOD", "3")


@pytest.fixture
def federation_processes(tmp_path):
    """``federation_processes(recipe, sites, **options)``: prepared, without running processes."""
    from fedmerge_peft.sites.rehearse import prepare_rehearsal

    created = []

    def make(recipe, sites, **options):
        out = tmp_path / f"federation-{len(created)}"
        created.append(FederationProcesses(out, prepare_rehearsal(recipe, sites, out, **options)))
        return created[-1]

    yield make
    for processes in created:
        processes.stop()
