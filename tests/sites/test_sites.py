"""A site controls its updates, limits and data checks; the server skips sites that fail."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedmerge_peft import Run
from fedmerge_peft.errors import FederateError, RefusedError
from fedmerge_peft.models import tiny
from fedmerge_peft.sites.config import (
    SITE_FILE,
    SiteLimits,
    SiteSettings,
    check_names,
    recipe_refusal,
)
from fedmerge_peft.sites.flare.provision import ALLOWED_CLASSES
from fedmerge_peft.sites.server.job import run_job
from fedmerge_peft.sites.server.roster import parse_label_counts
from fedmerge_peft.sites.site.release import strictest_privacy
from fedmerge_peft.sites.site.trainer import Trainer
from fedmerge_peft.sites.site_data import agree_on_labels
from fedmerge_peft.sites.wire import Message, WireError
from fedmerge_peft.training.plan import Choose, Train, UpdatePrivacy


def run_federation(kit, transport, requested_state=lambda: None):
    """Run a job; return its outcome and its events."""
    events = []
    return run_job(kit, transport, requested_state, events.append), events


def audit_entries(trainer, kind="train"):
    lines = (trainer.kit / "audit.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]


def test_a_sites_clip_bounds_its_updates_and_the_audit_log_has_both_norms(
    smoke, federation_of, connect
):
    clip = 1e-3
    kit, trainers = federation_of(
        smoke("strategy=fedavg", "rounds=2"), 2, settings={"site-1": {"privacy": {"clip": clip}}}
    )
    transport = connect(trainers)
    norms = {"site-1": [], "site-2": []}

    def collect(site, payload, reply):
        message = Message.from_bytes(reply)
        if message.kind == "trained":
            norms[site].append(float(message.tensors["deltas"].norm()))
        return reply

    transport.alter = collect
    assert run_federation(kit, transport)[0].state == "ended"
    assert all(norm == pytest.approx(clip) for norm in norms["site-1"])
    assert min(norms["site-2"]) > 2 * clip
    entries = audit_entries(trainers["site-1"])
    assert [entry["update_norm"] for entry in entries] == pytest.approx(norms["site-1"])
    assert all(entry["update_norm_unfiltered"] > 2 * clip for entry in entries)
    assert all(entry["bytes"] > 0 and len(entry["sha256"]) == 64 for entry in entries)


def test_a_sites_noise_does_not_follow_from_the_seed(smoke, federation_of, connect):
    rows = []
    for name in ("one", "two"):
        kit, trainers = federation_of(
            smoke("strategy=fedavg", "rounds=1"),
            2,
            settings={"site-1": {"privacy": {"clip": 0.1, "noise": 0.5}}},
            name=name,
        )
        assert run_federation(kit, connect(trainers))[0].state == "ended"
        rows.append(Run.open(kit / "run").soup.rows)
    assert float((rows[0] - rows[1]).std()) > 0.05


def test_the_strictest_clip_and_noise_apply():
    own = SiteSettings.model_validate({"privacy": {"clip": 2.0, "noise": 0.5}}).privacy
    assert strictest_privacy(own, UpdatePrivacy(1.0, 0.1)) == UpdatePrivacy(1.0, 0.5)
    assert strictest_privacy(own, UpdatePrivacy(3.0, 0.9)) == UpdatePrivacy(2.0, 0.9)
    assert strictest_privacy(SiteSettings().privacy, None) is None


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("lora.target_modules=[query, key]", "lora.target_modules"),
        ("training.learning_rate=0.5", "training.learning_rate"),
        ("backbone.model=tiny:gpt2", "backbone.model"),
        ("evaluation.finetuned=false", "evaluation.finetuned"),
    ],
)
def test_a_recipe_that_differs_from_the_kits_is_refused(override, error, smoke):
    assert error in recipe_refusal(smoke(override), smoke(), SiteLimits())


def test_a_server_may_change_rounds_strategy_and_participation(smoke):
    assert (
        recipe_refusal(
            smoke("rounds=9", "strategy=fedavg", "clients.fraction=0.5", "evaluation.every=2"),
            smoke(),
            SiteLimits(),
        )
        is None
    )


def test_remote_code_runs_only_where_a_site_allows_it(smoke):
    recipe = smoke("backbone.trust_remote_code=true")
    assert "code that comes with a model" in recipe_refusal(recipe, recipe, SiteLimits())
    assert recipe_refusal(recipe, recipe, SiteLimits(remote_code=True)) is None


def test_modules_that_a_site_does_not_allow_are_not_trained(smoke, federation_of, connect):
    kit, trainers = federation_of(
        smoke("clients.failures=skip"),
        2,
        settings={"site-2": {"allow": {"modules": ["query", "value"]}}},
    )
    outcome, events = run_federation(kit, connect(trainers))
    assert outcome.state == "ended"
    assert "the recipe trains classifier" in outcome.absent["site-2"]
    assert "without site-2" in events[0]


def test_clients_with_few_examples_are_refused(smoke, federation_of):
    with pytest.raises(RefusedError, match=r"training examples, and checks\.min_examples"):
        federation_of(smoke(), 2, settings={"site-1": {"checks": {"min_examples": 100}}})


def test_a_site_with_another_layout_is_refused_and_the_others_continue(
    smoke, federation_of, connect
):
    kit, trainers = federation_of(smoke("clients.failures=skip"), 2)
    other = trainers["site-2"]
    # a different layout, as from another version of PEFT
    other.recipe = other.recipe.replace(["lora.r=4"])
    outcome, _ = run_federation(kit, connect(trainers))
    assert "the server's model and adapters have the digest" in outcome.absent["site-2"]
    assert outcome.state == "ended"
    assert set(Run.open(kit / "run").records[-1]["clients"]) == {
        client.name for client in trainers["site-1"].data.clients
    }


def test_a_site_with_other_weights_is_refused(smoke, federation_of, connect, tmp_path):
    kit, trainers = federation_of(smoke("clients.failures=skip"), 2)
    tiny.write("bert", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = {name: 1.01 * tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    other = trainers["site-2"]
    other.recipe = other.recipe.replace([f"backbone.model={tmp_path / 'model'}"])
    outcome, _ = run_federation(kit, connect(trainers))
    assert "the weights, PEFT or fedmerge-peft differ" in outcome.absent["site-2"]
    assert outcome.state == "ended"


def test_a_federation_without_sites_fails_with_each_sites_reason(smoke, federation_of, connect):
    kit, trainers = federation_of(smoke(), 2)
    for trainer in trainers.values():
        trainer.agreed = trainer.agreed.replace(["training.learning_rate=0.123"])
    outcome, _ = run_federation(kit, connect(trainers))
    assert outcome.state == "failed"
    assert "no site can take part" in outcome.error
    assert outcome.error.count("training.learning_rate is 0.001, but 0.123 in the kit") == 2


def test_an_invalid_reply_costs_its_client_that_round_only(smoke, federation_of, connect):
    kit, trainers = federation_of(smoke("rounds=2", "clients.failures=skip"), 2)
    transport = connect(trainers)
    count = 0

    def corrupt(site, payload, reply):
        nonlocal count
        trained = Message.from_bytes(reply).kind == "trained"
        count += trained
        return b"rubbish" if count == 1 and trained else reply

    transport.alter = corrupt
    outcome, _ = run_federation(kit, transport)
    first, second = Run.open(kit / "run").records
    assert outcome.state == "ended"
    assert [why.partition(" (")[0] for why in first["failures"].values()] == [
        "a message of 7 bytes cannot be read"
    ]
    assert not second["failures"]


def test_a_run_in_segments_equals_a_run_in_one_job(smoke, federation_of, connect):
    recipe = smoke("rounds=4", "baselines=[fedavg]")
    whole, trainers = federation_of(recipe, 2, name="whole")
    assert run_federation(whole, connect(trainers))[0].state == "ended"
    parts, trainers = federation_of(recipe, 2, name="parts", segment=3)
    states = []
    while not states or states[-1] == "paused":
        states.append(run_federation(parts, connect(trainers))[0].state)
    assert states == ["paused", "paused", "ended"]
    for name in ("", "baselines/fedavg"):
        one, two = (Run.open(kit / "run" / name) for kit in (whole, parts))
        assert torch.equal(one.soup.rows, two.soup.rows)
        assert torch.equal(one.state()[1], two.state()[1])


def test_a_site_that_connects_late_takes_part_from_then_on(smoke, federation_of, connect):
    kit, trainers = federation_of(smoke("rounds=3", "clients.failures=skip"), 3, segment=1)
    early = {site: trainers[site] for site in ("site-1", "site-3")}
    assert run_federation(kit, connect(early))[0].state == "paused"
    while run_federation(kit, connect(trainers))[0].state == "paused":
        pass
    run = Run.open(kit / "run")
    assert [len(record["clients"]) for record in run.records] == [4, 6, 6]
    assert (run.clients["train"] > 0).all()
    assert (run.label_counts.sum(axis=1) == run.clients["train"]).all()


@pytest.mark.parametrize(
    ("counts", "one_each", "fits"),
    [
        ([[2, 3]], True, True),
        ([[2, 2]], True, False),
        ([[5, 4]], True, False),
        ([[5, 4]], False, True),
        ([[0, 0]], False, True),
        ([[6, 0]], False, False),
        ([[2, 3, 0]], False, False),
        ([[2, 3], [1, 1]], False, False),
        (None, False, False),
    ],
)
def test_label_counts_must_fit_the_examples(counts, one_each, fits):
    client = SimpleNamespace(train=5)
    message = Message("opened", {"layout": "0" * 64, "size": 1, "counts": counts})
    if fits:
        assert parse_label_counts(message, [client], ["a", "b"], one_each=one_each) == counts
    else:
        with pytest.raises(WireError, match="counts of labels do not fit"):
            parse_label_counts(message, [client], ["a", "b"], one_each=one_each)


def test_data_that_change_within_a_federation_are_refused(smoke, federation_of, connect):
    kit, trainers = federation_of(smoke("rounds=2", "clients.failures=skip"), 2, segment=1)
    run_federation(kit, connect(trainers))
    trainers["site-1"].summary.clients[0]["train"] += 1
    outcome, _ = run_federation(kit, connect(trainers))
    assert "its counts of labels do not fit its examples" in outcome.absent["site-1"]


def test_a_stopped_run_ends_after_a_whole_round_and_continues_from_there(
    smoke, federation_of, connect
):
    kit, trainers = federation_of(smoke("rounds=3"), 2)
    outcome, _ = run_federation(kit, connect(trainers), lambda: "stopped")
    assert (outcome.state, outcome.rounds, outcome.total) == ("stopped", 1, 3)
    assert run_federation(kit, connect(trainers))[0].rounds == 3


def test_each_client_gets_its_adapter_as_a_peft_folder_at_its_own_site(
    smoke, federation_of, connect
):
    from safetensors.torch import load_file

    kit, trainers = federation_of(smoke("rounds=1"), 2)
    outcome, _ = run_federation(kit, connect(trainers))
    run = Run.open(kit / "run")
    for trainer in trainers.values():
        for client in trainer.data.clients:
            assert outcome.adapters[client.name] is None
            folder = trainer.kit / "adapters" / client.name
            stored = load_file(folder / "adapter_model.safetensors")
            expected = run.adapter(client.name)
            assert stored.keys() == expected.keys()
            assert all(torch.equal(stored[key], expected[key]) for key in stored)
            assert (
                json.loads((folder / "adapter_config.json").read_text())["r"] == run.recipe.lora.r
            )
            assert (folder / "README.md").read_text().startswith("---")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("rounds: 3", "site.yaml:1: rounds: unknown key"),
        ("training: {learning_rate: 1}", "training: unknown key"),
        ("data:\n  pth: x", "site.yaml:2: data.pth: unknown key; data may set path, separator"),
        ("privacy: {mode: local}", "privacy.mode: unknown key; privacy may set clip, noise"),
        ("batch_size: 0", "batch_size"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_sites_file_sets_only_the_sites_keys(text, error, tmp_path):
    (tmp_path / SITE_FILE).write_text(text)
    with pytest.raises(FederateError, match=error.replace(".", r"\.")):
        SiteSettings.read(tmp_path / SITE_FILE)


def test_a_sites_batch_size_does_not_change_a_step(smoke):
    recipe = smoke("training.batch_size=8", "training.gradient_accumulation=2")
    training = SiteSettings(batch_size=4, device="cpu").apply_to(recipe).training
    assert (training.batch_size, training.gradient_accumulation, training.device) == (4, 4, "cpu")
    with pytest.raises(FederateError, match="which does not divide 16,"):
        SiteSettings(batch_size=5).apply_to(recipe)


@pytest.mark.parametrize("name", ["../up", "a/b", "", "server", "a b", "-x", "é"])
def test_a_site_name_cannot_point_outside_its_folder(name):
    with pytest.raises(FederateError, match="is not a valid site name"):
        check_names({name: ["a"]})


def test_a_client_belongs_to_one_site():
    with pytest.raises(FederateError, match="named more than once"):
        check_names({"a": ["x"], "b": ["x"]})


def test_labels_are_matched_by_name():
    assert agree_on_labels([["b", "c"], ["a", "c"]], None) == ["a", "b", "c"]
    assert agree_on_labels([["0", "1"], [str(n) for n in range(12)]], None) == [
        str(n) for n in range(12)
    ]
    assert agree_on_labels([["a"], ["b"]], 3) == ["a", "b", "LABEL_2"]
    assert agree_on_labels([["0", "3"], ["0"]], 5) == ["0", "1", "2", "3", "4"]
    assert agree_on_labels([["0", "7"], ["0"]], 5) == ["0", "7", "LABEL_2", "LABEL_3", "LABEL_4"]
    with pytest.raises(FederateError, match="3 labels"):
        agree_on_labels([["a", "b"], ["c"]], 2)
    with pytest.raises(FederateError, match="the examples of all sites have the label a"):
        agree_on_labels([["a"], ["a"]], None)
    assert agree_on_labels([["a"], ["a"]], None, one_each=False) == ["a"]


def test_a_job_names_only_allowed_classes():
    from fedmerge_peft.sites.flare.names import CONTROLLER, EXECUTOR

    assert CONTROLLER.startswith(ALLOWED_CLASSES)
    assert EXECUTOR.startswith(ALLOWED_CLASSES)


def test_an_assignment_for_another_sites_client_is_refused(smoke, federation_of, connect):
    kit, trainers = federation_of(smoke("rounds=1"), 2)
    transport = connect(trainers)
    run_federation(kit, transport)
    assignment = next(
        payload
        for site, payload in transport.sent
        if site == "site-1" and Message.from_bytes(payload).kind == "train"
    )
    reply = Message.from_bytes(trainers["site-2"].handle(assignment))
    assert (reply.kind, reply.fields["refused"]) == ("error", True)
    assert "which is not at this site" in reply.fields["error"]


def test_a_server_cannot_request_less_privacy_than_the_kits_recipe(smoke, federation_of):
    _kit, trainers = federation_of(
        smoke("privacy={mode: local, clip: 0.1, noise: 1}"),
        2,
        settings={"site-1": {"privacy": {"noise": 0.5}}},
    )
    row = torch.zeros(3)
    for weaker in (UpdatePrivacy(1e9, 0.0), UpdatePrivacy(0.1, 0.1)):
        assert trainers["site-1"].release.update_privacy(
            Train(row, privacy=weaker)
        ) == UpdatePrivacy(0.1, 0.5)
        assert trainers["site-2"].release.update_privacy(
            Train(row, privacy=weaker)
        ) == UpdatePrivacy(0.1, 0.2)
    assert trainers["site-2"].release.update_privacy(
        Train(row, privacy=UpdatePrivacy(0.05, 3.0))
    ) == UpdatePrivacy(0.05, 3.0)
    for plan in (Train(row), Choose(row[None])):
        with pytest.raises(RefusedError, match="request does not clip the update"):
            trainers["site-2"].release.update_privacy(plan)


def test_a_trainer_without_data_is_refused(smoke, federation_of):
    _kit, trainers = federation_of(smoke(), 2)
    with pytest.raises(RefusedError, match="names no data"):
        Trainer(trainers["site-1"].kit, "site-1", SiteSettings())


def test_modules_that_the_servers_recipe_names_are_not_imported(
    smoke, federation_of, tmp_path, monkeypatch
):
    (tmp_path / "servers_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    _kit, trainers = federation_of(smoke(), 2)
    trainer = trainers["site-1"]
    text = trainer.agreed.model_copy(update={"plugins": ["servers_module"]}).to_yaml()
    fields = {"recipe": text, "dtype": trainer.federation.wire_dtype}
    reply = Message.from_bytes(trainer.handle(Message("enroll", fields).to_bytes()))
    assert reply.kind == "enrolled"
    assert "servers_module" not in sys.modules
