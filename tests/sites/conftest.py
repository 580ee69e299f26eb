"""Federations across sites without a network: trainers that answer in this process."""

from pathlib import Path

import pytest

from fedmerge_peft.data import federate_data


class Loop:
    """A transport that carries messages to trainers in this process, and may lose, change or keep some."""

    def __init__(self, trainers, bend=None):
        self.trainers = trainers
        self.bend = bend or (lambda site, content, answer: answer)
        self.sent = []

    @property
    def sites(self):
        return list(self.trainers)

    def ask(self, letters, deadline):
        for site, queue in letters.items():
            for number, letter in queue:
                content = letter()
                self.sent.append((site, content))
                yield site, number, self.bend(site, content, self.trainers[site].answer(content))


@pytest.fixture
def federation_of(tmp_path):
    """``federation_of(recipe, 3)``: a server's kit, and the trainers of three sites that hold the recipe's clients between them."""
    from fedmerge_peft.sites.config import RECIPE, SITE, Federation, SiteSettings
    from fedmerge_peft.sites.site.trainer import Trainer
    from fedmerge_peft.sites.site_data import deal, write_site

    def make(recipe, sites, *, settings=None, name="federation", **facts):
        recipe = recipe.replace(["training.clients_per_batch=1"])
        data = federate_data(recipe.data, getattr(recipe.task, "label", None), recipe.seed)
        federation = Federation(
            project="test",
            host="localhost",
            port=1,
            sites=deal(data, sites),
            **{"deadline": 60, **facts},
        )
        trainers = {}
        for kit in ("server", *federation.sites):
            folder: Path = tmp_path / name / kit
            folder.mkdir(parents=True)
            federation.write(folder)
            (folder / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
            if kit != "server":
                write_site(data, federation.sites[kit], folder, (settings or {}).get(kit, {}))
                trainers[kit] = Trainer(folder, kit, SiteSettings.read(folder / SITE))
        return tmp_path / name / "server", trainers

    return make


@pytest.fixture
def loop():
    """``loop(trainers)``: a transport to these trainers."""
    return Loop
