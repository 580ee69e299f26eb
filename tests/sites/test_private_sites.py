"""A private site sends updates with noise and nothing else, and counts them on its disk."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from nvflare.apis.executor import Executor
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal

from fedmerge_peft import Run
from fedmerge_peft.errors import FederateError, RecipeError, RefusedError
from fedmerge_peft.sites.config import SITE_FILE, SiteSettings
from fedmerge_peft.sites.flare.executor import SiteExecutor
from fedmerge_peft.sites.flare.names import DEADLINE, ERROR, PAYLOAD
from fedmerge_peft.sites.prepare import federated_recipe
from fedmerge_peft.sites.server.job import run_job
from fedmerge_peft.sites.site.privacy_budget import BUDGET_FILE, PrivacyBudget
from fedmerge_peft.sites.site.release import WITHHELD, agreed_epsilon
from fedmerge_peft.sites.site.trainer import Trainer
from fedmerge_peft.sites.wire import Message
from fedmerge_peft.training.plan import Choose, Train
from fedmerge_peft.training.update_privacy import UpdatePrivacy
from fedmerge_peft.util.gaussian_privacy import epsilon_of

LOCAL = "privacy={mode: local, clip: 0.5, noise: 2}"


def run_federation(kit, transport):
    return run_job(kit, transport, lambda: None, lambda line: None)


def listening(transport):
    """Collect the messages that leave each site."""
    heard = []

    def listen(site, payload, reply):
        heard.append((site, Message.from_bytes(payload), Message.from_bytes(reply)))
        return reply

    transport.alter = listen
    return heard


def reopened(trainer):
    """The trainer after a restart, with the job opened again."""
    site = trainer.kit.name
    return Trainer(trainer.kit, site, SiteSettings.read(trainer.kit / SITE_FILE))


@pytest.fixture
def local_site(smoke, federation_of, connect):
    """A site after one round under local privacy, and the messages that it has received."""

    def make(*overrides, settings=None):
        recipe = smoke("strategy=fedavg", "rounds=1", LOCAL, "clients.failures=skip", *overrides)
        kit, trainers = federation_of(recipe, 2, settings={"site-1": settings or {}})
        transport = connect(trainers)
        heard = listening(transport)
        assert run_federation(kit, transport).state == "ended"
        received = [asked for site, asked, _ in heard if site == "site-1"]
        return trainers["site-1"], {message.kind: message for message in received}

    return make


def answer(trainer, message, **fields):
    """The trainer's reply to a message with other fields."""
    altered = replace(message, fields={**message.fields, **fields})
    return Message.from_bytes(trainer.handle(altered.to_bytes()))


def noisy(message):
    """True if an update has the deviation of N(0, (z · 2C)²), which dominates its norm of C."""
    update = message.tensors["deltas"]
    six_errors = 6 / (2 * update.numel()) ** 0.5
    return float(update.std()) == pytest.approx(2.0, rel=six_errors)


# ---- what leaves a site --------------------------------------------------------------------------


def test_nothing_but_updates_with_noise_leaves_a_site_under_local_privacy(
    smoke, federation_of, connect
):
    recipe = smoke("strategy=fedavg", "rounds=2", LOCAL)
    kit, trainers = federation_of(recipe, 2)
    transport = connect(trainers)
    heard = listening(transport)
    assert run_federation(kit, transport).state == "ended"
    replies = {kind: [m for _, _, m in heard if m.kind == kind] for kind in ("opened", "trained")}
    for _, _, message in heard:
        if message.kind == "enrolled":
            for client in message.fields["clients"]:
                assert {key: client[key] for key in client if key != "name"} == {
                    "group": "",
                    "train": 1,
                    "validation": 0,
                    "test": 0,
                }
    assert all(message.fields["counts"] is None for message in replies["opened"])
    assert len(replies["trained"]) == 2 * len(Run.open(kit / "run").client_names)
    for message in replies["trained"]:
        known = {"round", "client", "layout", "dtype"}
        assert {key: value for key, value in message.fields.items() if key not in known} == {
            "num_examples": 1,
            "train_loss": None,
            "seconds": 0.0,
            "served": None,
            "finetuned": None,
            "validation": None,
            "choice": 0,
        }
        assert set(message.tensors) == {"deltas"}
        assert noisy(message)
    run = Run.open(kit / "run")
    assert not (run.path / "labels.json").exists()
    assert [record["train_loss"] for record in run.records] == [None, None]
    assert run.summary["final"]["served"] is None
    assert run.summary["best"] is None


def test_a_private_site_answers_scoring_requests_without_scores(local_site, smoke, connect):
    trainer, received = local_site()
    message = received["train"]
    fields = {
        **message.fields,
        "plan": None,
        "served": {"row": message.fields["plan"]["row"]},
    }
    reply = Message.from_bytes(
        trainer.handle(replace(message, kind="evaluate", fields=fields).to_bytes())
    )
    assert (reply.kind, reply.fields["scores"]) == ("evaluated", None)


def test_a_client_that_fails_is_not_distinguished_from_one_that_trains(local_site, caplog):
    trainer, received = local_site(settings={"privacy": {"epsilon": 50.0}})
    message = received["train"]
    for engine_fails in (False, True):
        if engine_fails:
            trainer._open[1].clients[0].train[:] = 10**9  # beyond the table
            trainer._open[1].clear_caches()
        reply = answer(trainer, message, client=trainer.data.clients[0].name)
        assert (reply.kind, reply.fields["train_loss"]) == ("trained", None)
        assert noisy(reply)
    assert "the site sends noise in place of the client's update" in caplog.text


def test_a_failing_client_of_a_site_with_noise_of_its_own_reports_its_size(local_site):
    """Without local privacy in the recipe, the server knows the sizes, and refuses another."""
    noise = {"privacy": {"clip": 0.5, "noise": 2.0}}
    trainer, received = local_site("privacy={mode: none}", settings=noise)
    client = trainer.data.clients[0]
    size = client.size
    trainer._open[1].clients[0].train[:] = 10**9  # beyond the table
    trainer._open[1].clear_caches()
    reply = answer(trainer, received["train"], client=client.name)
    assert (reply.kind, reply.fields["num_examples"]) == ("trained", size)


def test_a_trainer_that_does_not_start_sends_no_cause(tmp_path):
    class InThisProcess(SiteExecutor):
        def __init__(self):
            Executor.__init__(self)
            self._connection = self._trainer = None

        def _kit(self, fl_ctx):
            return tmp_path

    (tmp_path / SITE_FILE).write_text("a secret: 1")
    asked = Shareable({PAYLOAD: Message("enroll", {}).to_bytes(), DEADLINE: 9.0})
    reply = InThisProcess().execute("enroll", asked, FLContext(), Signal())
    assert reply[ERROR] == "the trainer does not start; see the site's log"


def test_a_baseline_whose_adapters_no_noise_protects_is_refused(smoke):
    recipe = smoke("strategy=fedavg", "baselines=[fedprox, local]", LOCAL)
    with pytest.raises(RecipeError, match=r"baselines\[1\].name: the server keeps the adapters"):
        federated_recipe(recipe)
    federated_recipe(smoke("strategy=fedavg", "baselines=[fedprox]", LOCAL))


def test_other_failures_of_a_private_site_have_one_text(local_site, monkeypatch):
    trainer, received = local_site()
    monkeypatch.setattr(trainer.release, "charge", lambda *_: 1 / 0)
    reply = answer(trainer, received["train"])
    assert (reply.kind, reply.fields["error"]) == ("error", WITHHELD)


def test_a_site_with_its_own_noise_withholds_losses_scores_and_choices(
    smoke, federation_of, connect
):
    kit, trainers = federation_of(
        smoke("strategy=fedavg", "rounds=1"),
        2,
        settings={"site-1": {"privacy": {"clip": 0.1, "noise": 0.5}}},
    )
    transport = connect(trainers)
    heard = listening(transport)
    assert run_federation(kit, transport).state == "ended"
    for site, _, reply in heard:
        if reply.kind == "trained":
            assert (reply.fields["train_loss"] is None) == (site == "site-1")
            assert (reply.fields["served"] is None) == (site == "site-1")
    (record,) = Run.open(kit / "run").records
    assert record["train_loss"] > 0
    row = torch.zeros(3)
    with pytest.raises(RefusedError, match="no choices or weights"):
        trainers["site-1"].release.update_privacy(Choose(row[None]))
    assert trainers["site-2"].release.update_privacy(Choose(row[None])) is None


def test_additions_to_the_backbone_are_refused_unless_the_strategy_makes_some(local_site):
    trainer, received = local_site()
    message = received["train"]
    module = next(iter(trainer._open[1].backbone.scaling))
    altered = Message(
        "train",
        {**message.fields, "base": {module: "base"}},
        {**message.tensors, "base": torch.zeros(2, 2)},
    )
    reply = Message.from_bytes(trainer.handle(altered.to_bytes()))
    assert (
        "sent an addition to the backbone, but no strategy of its recipe makes one"
        in reply.fields["error"]
    )


@pytest.mark.parametrize(
    ("privacy", "error"),
    [
        ({"noise": 1.0}, "protects nothing without a bound"),
        ({"epsilon": 1.0}, "needs updates with noise"),
        ({"epsilon": 1.0, "clip": 1.0}, "needs updates with noise"),
    ],
)
def test_settings_that_protect_nothing_are_refused(privacy, error, smoke, federation_of):
    with pytest.raises(RefusedError, match=error):
        federation_of(smoke(), 2, settings={"site-1": {"privacy": privacy}})


@pytest.mark.parametrize(("clip", "noise"), [(-1e9, 1.0), (float("nan"), 1.0), (1.0, -1.0)])
def test_a_clip_or_noise_that_protects_nothing_is_no_number(clip, noise, local_site):
    with pytest.raises(ValueError, match="expected a"):
        UpdatePrivacy(clip, noise)
    trainer, received = local_site()
    plan = {**received["train"].fields["plan"], "privacy": {"clip": clip, "noise": noise}}
    reply = answer(trainer, received["train"], plan=plan)
    assert (reply.kind, reply.fields["refused"]) == ("error", True)


# ---- central privacy across sites ----------------------------------------------------------------


def test_central_noise_across_sites_follows_from_no_seed(smoke, federation_of, connect):
    rows = []
    for name in ("one", "two"):
        recipe = smoke("strategy=fedavg", "rounds=1", "privacy={mode: central, clip: 1, noise: 1}")
        kit, trainers = federation_of(recipe, 2, name=name)
        assert run_federation(kit, connect(trainers)).state == "ended"
        run = Run.open(kit / "run")
        assert [record["noise"] for record in run.records] == ["operating system"]
        assert run.summary["privacy"]["noise"] == "operating system"
        rows.append(run.soup.rows)
    # two draws of N(0, (C/K)²) with K = 6 are √2/6 apart in each value
    assert float((rows[0] - rows[1]).std()) == pytest.approx(2**0.5 / 6, rel=0.2)


def test_a_round_that_fails_and_is_repeated_counts_twice(smoke, federation_of, connect):
    recipe = smoke(
        "strategy=fedavg", "rounds=2", "privacy={mode: central, noise: 2}", "clients.failures=raise"
    )
    kit, trainers = federation_of(recipe, 2)
    transport = connect(trainers)
    fails = iter([True])
    transport.alter = lambda site, payload, reply: (
        b"" if Message.from_bytes(reply).kind == "trained" and next(fails, False) else reply
    )
    assert run_federation(kit, transport).state == "failed"
    assert run_federation(kit, transport).state == "ended"
    epsilons = [record["epsilon"] for record in Run.open(kit / "run").records]
    assert epsilons == [epsilon_of(2 / 4, 1e-5), epsilon_of(3 / 4, 1e-5)]


# ---- the budget ----------------------------------------------------------------------------------


def test_a_site_refuses_when_its_budget_is_spent_and_remembers_it_after_a_restart(local_site):
    trainer, received = local_site("rounds=3")
    client = received["train"].fields["client"]
    refused = answer(trainer, received["train"], client=client)
    assert (refused.kind, refused.fields["refused"]) == ("error", True)
    assert (
        f"the privacy budget of client {client} does not suffice: its updates so far (3)"
        in refused.fields["error"]
    )
    assert f"set a larger privacy.epsilon in {SITE_FILE}" in refused.fields["error"]
    again = reopened(trainer)
    assert again.handle(received["enroll"].to_bytes())
    assert again.handle(received["open"].to_bytes())
    assert "does not suffice" in answer(again, received["train"], client=client).fields["error"]
    # a larger budget is the site's own decision
    path = trainer.kit / SITE_FILE
    path.write_text(path.read_text() + "\nprivacy: {epsilon: 100}\n")
    richer = reopened(trainer)
    richer.handle(received["open"].to_bytes())
    assert answer(richer, received["train"], client=client).kind == "trained"
    assert richer.release.budget.spent(client).updates == 4


def test_baselines_and_repeated_rounds_count_at_the_site(local_site):
    trainer, received = local_site(
        "rounds=3", "baselines=[fedprox]", settings={"privacy": {"epsilon": 50.0}}
    )
    client = received["train"].fields["client"]
    budget = trainer.release.budget
    assert budget.spent(client).updates == 6
    answer(trainer, received["train"])  # the server asks for a round again
    assert budget.spent(client).updates == 7
    assert budget.epsilon_spent(client) == pytest.approx(epsilon_of(7 / 2.0**2, 1e-5))


def test_the_default_budget_is_the_epsilon_of_the_kits_recipe(smoke):
    recipe = smoke("rounds=3", "baselines=[fedprox, local]", "strategy=fedavg", LOCAL)
    assert agreed_epsilon(recipe) == epsilon_of(6 / 4, 1e-5)


def test_a_stricter_plan_costs_less_and_a_wider_clip_of_the_server_changes_nothing(local_site):
    trainer, _ = local_site(settings={"privacy": {"epsilon": 50.0}})
    rules, row = trainer.release, torch.zeros(3)

    def cost(clip, noise):
        plan = Train(row, privacy=UpdatePrivacy(clip, noise))
        return rules.update_privacy(plan).mu_squared

    assert cost(0.5, 2.0) == cost(1e6, 0.0) == (2 * 0.5 / 2.0) ** 2
    assert cost(0.25, 4.0) == (2 * 0.25 / 4.0) ** 2


@pytest.mark.parametrize("text", ["{", "[]", '{"clients": {"a": {"updates": -1}}}'])
def test_a_damaged_budget_stops_the_site(text, tmp_path):
    (tmp_path / BUDGET_FILE).write_text(text)
    with pytest.raises(FederateError, match=BUDGET_FILE):
        PrivacyBudget(tmp_path, 1e-5, 1.0).charge("a", 0.1)


def test_an_update_that_exceeds_the_budget_charges_nothing(tmp_path):
    budget = PrivacyBudget(tmp_path, 1e-5, epsilon_of(2.0, 1e-5))
    budget.charge("a", 1.0)
    with pytest.raises(RefusedError, match=r"so far \(1\) have .* and 1 more would make it"):
        budget.charge("a", 1.5)
    with pytest.raises(RefusedError, match=r"so far \(1\) have .* and 3 more would make it"):
        budget.charge("a", 0.5, 3)
    budget.charge("a", 1.0)
    with pytest.raises(RefusedError, match=r"so far \(2\) have"):
        budget.charge("a", 1e-3)
    budget.charge("b", 2.0)
    assert budget.spent("a").mu_squared == 2.0


_RELEASES = """
import sys
from pathlib import Path
from fedmerge_peft.sites.site.privacy_budget import PrivacyBudget

budget = PrivacyBudget(Path(sys.argv[1]), 1e-5, None)
while True:
    budget.charge("a", 0.25)
    print("released", flush=True)
"""


def test_no_update_leaves_uncounted_when_the_site_is_killed(tmp_path):
    released = 0
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", _RELEASES, str(tmp_path)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            text=True,
        )
        with process.stdout:
            for _ in range(5):
                assert process.stdout.readline() == "released\n"
                released += 1
            process.send_signal(signal.SIGKILL)
            released += len(process.stdout.readlines())
        process.wait()
        spent = PrivacyBudget(tmp_path, 1e-5, None).spent("a")
        assert released <= spent.updates
        assert spent.mu_squared == 0.25 * spent.updates
        assert json.loads((tmp_path / BUDGET_FILE).read_text())["delta"] == 1e-5
