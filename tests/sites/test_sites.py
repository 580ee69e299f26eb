"""What a site decides for itself: what leaves, what it allows, what its data must be; and what the server makes of sites that fail."""

import json

import pytest
import torch

from fedmerge_peft import Run
from fedmerge_peft.errors import FederateError, RefusedError
from fedmerge_peft.sites.config import SITE, SiteLimits, SiteSettings, check_names, refusal
from fedmerge_peft.sites.flare.provision import OURS
from fedmerge_peft.sites.messages import Message
from fedmerge_peft.sites.server.job import run_job
from fedmerge_peft.sites.site.trainer import Trainer, stricter
from fedmerge_peft.sites.site_data import agree_on_labels
from fedmerge_peft.training.plan import Choose, Train, UpdatePrivacy


def go(kit, transport, stop=lambda: None):
    told = []
    return run_job(kit, transport, stop, told.append), told


def left(trainer, kind="train"):
    lines = (trainer.kit / "audit.jsonl").read_text().splitlines()
    return [said for line in lines if (said := json.loads(line))["kind"] == kind]


def test_a_sites_own_filter_clips_what_leaves_and_its_log_says_so(smoke, federation_of, loop):
    clip = 1e-3
    kit, trainers = federation_of(
        smoke("strategy=fedavg", "rounds=2"), 2, settings={"site-1": {"privacy": {"clip": clip}}}
    )
    transport = loop(trainers)
    seen = {"site-1": [], "site-2": []}

    def look(site, content, answer):
        message = Message.from_bytes(answer)
        if message.kind == "reply":
            seen[site].append(float(message.tensors["deltas"].norm()))
        return answer

    transport.bend = look
    assert go(kit, transport)[0].state == "ended"
    assert all(norm == pytest.approx(clip) for norm in seen["site-1"])
    assert min(seen["site-2"]) > 2 * clip
    entries = left(trainers["site-1"])
    assert [entry["norm"] for entry in entries] == pytest.approx(seen["site-1"])
    assert all(entry["norm_trained"] > 2 * clip for entry in entries)
    assert all(entry["bytes"] > 0 and len(entry["sha256"]) == 64 for entry in entries)


def test_a_sites_own_noise_cannot_be_told_from_the_seed(smoke, federation_of, loop):
    rows = []
    for name in ("one", "two"):
        kit, trainers = federation_of(
            smoke("strategy=fedavg", "rounds=1"),
            2,
            settings={"site-1": {"privacy": {"clip": 0.1, "noise": 0.5}}},
            name=name,
        )
        assert go(kit, loop(trainers))[0].state == "ended"
        rows.append(Run.open(kit / "run").soup.rows)
    assert float((rows[0] - rows[1]).std()) > 0.05


def test_the_stricter_of_two_filters_counts():
    own = SiteSettings.model_validate({"privacy": {"clip": 2.0, "noise": 0.5}}).privacy
    assert stricter(own, UpdatePrivacy(1.0, 0.1)) == UpdatePrivacy(1.0, 0.5)
    assert stricter(own, UpdatePrivacy(3.0, 0.9)) == UpdatePrivacy(2.0, 0.9)
    assert stricter(SiteSettings().privacy, None) is None


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lora.target_modules=[query, key]", "lora.target_modules"),
        ("training.learning_rate=0.5", "training.learning_rate"),
        ("backbone.model=tiny:gpt2", "backbone.model"),
        ("evaluation.finetuned=false", "evaluation.finetuned"),
    ],
)
def test_a_server_that_asks_for_another_recipe_than_the_kits_is_refused(override, said, smoke):
    assert said in refusal(smoke(override), smoke(), SiteLimits())


def test_a_server_may_change_what_no_site_does_otherwise_for(smoke):
    assert (
        refusal(
            smoke("rounds=9", "strategy=fedavg", "clients.fraction=0.5", "evaluation.every=2"),
            smoke(),
            SiteLimits(),
        )
        is None
    )


def test_remote_code_runs_only_where_a_site_allows_it(smoke):
    recipe = smoke("backbone.trust_remote_code=true")
    assert "code that comes with a model" in refusal(recipe, recipe, SiteLimits())
    assert refusal(recipe, recipe, SiteLimits(remote_code=True)) is None


def test_modules_that_a_site_does_not_allow_are_not_trained(smoke, federation_of, loop):
    kit, trainers = federation_of(
        smoke("clients.failures=skip"),
        2,
        settings={"site-2": {"allow": {"modules": ["query", "value"]}}},
    )
    outcome, told = go(kit, loop(trainers))
    assert outcome.state == "ended"
    assert "classifier would train" in outcome.absent["site-2"]
    assert "without site-2" in told[0]


def test_clients_of_few_examples_do_not_take_part(smoke, federation_of):
    with pytest.raises(RefusedError, match=r"training examples, and checks\.min_examples"):
        federation_of(smoke(), 2, settings={"site-1": {"checks": {"min_examples": 100}}})


def test_a_site_with_another_layout_is_refused_and_the_others_go_on(smoke, federation_of, loop):
    kit, trainers = federation_of(smoke("clients.failures=skip"), 2)
    other = trainers["site-2"]
    other.recipe = other.recipe.replace(
        ["lora.r=4"]
    )  # as if another version of PEFT laid adapters out differently
    outcome, _ = go(kit, loop(trainers))
    assert "the server's adapters have layout" in outcome.absent["site-2"]
    assert outcome.state == "ended"
    assert set(Run.open(kit / "run").records[-1]["clients"]) == {
        client.name for client in trainers["site-1"].data.clients
    }


def test_a_federation_without_sites_fails_with_each_sites_own_reason(smoke, federation_of, loop):
    kit, trainers = federation_of(smoke(), 2)
    for trainer in trainers.values():
        trainer.agreed = trainer.agreed.replace(["training.learning_rate=0.123"])
    outcome, _ = go(kit, loop(trainers))
    assert outcome.state == "failed"
    assert "no site takes part" in outcome.error
    assert outcome.error.count("training.learning_rate is 0.001, and 0.123 in the kit") == 2


def test_an_answer_that_is_none_costs_its_client_that_round_only(smoke, federation_of, loop):
    kit, trainers = federation_of(smoke("rounds=2", "clients.failures=skip"), 2)
    transport = loop(trainers)
    count = 0

    def spoil(site, content, answer):
        nonlocal count
        count += Message.from_bytes(answer).kind == "reply"
        return b"rubbish" if count == 1 and Message.from_bytes(answer).kind == "reply" else answer

    transport.bend = spoil
    outcome, _ = go(kit, transport)
    first, second = Run.open(kit / "run").records
    assert outcome.state == "ended"
    assert [why.partition(" (")[0] for why in first["failures"].values()] == [
        "7 bytes that are no message"
    ]
    assert not second["failures"]


def test_segments_of_rounds_end_as_one_whole_run_does(smoke, federation_of, loop):
    recipe = smoke("rounds=4", "baselines=[fedavg]")
    whole, trainers = federation_of(recipe, 2, name="whole")
    assert go(whole, loop(trainers))[0].state == "ended"
    parts, trainers = federation_of(recipe, 2, name="parts", segment=3)
    states = []
    while not states or states[-1] == "segment":
        states.append(go(parts, loop(trainers))[0].state)
    assert states == ["segment", "segment", "ended"]
    for name in ("", "baselines/fedavg"):
        one, two = (Run.open(kit / "run" / name) for kit in (whole, parts))
        assert torch.equal(one.soup.rows, two.soup.rows)
        assert torch.equal(one.state()[1], two.state()[1])


def test_a_site_that_comes_late_takes_part_from_then_on(smoke, federation_of, loop):
    kit, trainers = federation_of(smoke("rounds=3", "clients.failures=skip"), 3, segment=1)
    early = {site: trainers[site] for site in ("site-1", "site-3")}
    assert go(kit, loop(early))[0].state == "segment"
    while go(kit, loop(trainers))[0].state == "segment":
        pass
    run = Run.open(kit / "run")
    assert [len(record["clients"]) for record in run.records] == [4, 6, 6]
    assert (run.clients["train"] > 0).all()
    assert (run.label_counts.sum(axis=1) == run.clients["train"]).all()


def test_data_that_change_within_a_federation_are_refused(smoke, federation_of, loop):
    kit, trainers = federation_of(smoke("rounds=2", "clients.failures=skip"), 2, segment=1)
    go(kit, loop(trainers))
    trainers["site-1"].told.clients[0]["train"] += 1
    outcome, _ = go(kit, loop(trainers))
    assert "its counts of labels do not add up to its examples" in outcome.absent["site-1"]


def test_a_stop_ends_after_a_whole_round_and_the_run_goes_on_from_there(smoke, federation_of, loop):
    kit, trainers = federation_of(smoke("rounds=3"), 2)
    outcome, _ = go(kit, loop(trainers), lambda: "stopped")
    assert (outcome.state, outcome.rounds, outcome.total) == ("stopped", 1, 3)
    assert go(kit, loop(trainers))[0].rounds == 3


def test_each_client_gets_its_adapter_as_a_peft_folder_at_its_own_site(smoke, federation_of, loop):
    from safetensors.torch import load_file

    kit, trainers = federation_of(smoke("rounds=1"), 2)
    outcome, _ = go(kit, loop(trainers))
    run = Run.open(kit / "run")
    for trainer in trainers.values():
        for client in trainer.data.clients:
            assert outcome.adapters[client.name] is None
            folder = trainer.kit / "adapters" / client.name
            mine, servers = (
                load_file(folder / "adapter_model.safetensors"),
                run.adapter(client.name),
            )
            assert mine.keys() == servers.keys()
            assert all(torch.equal(mine[key], servers[key]) for key in mine)
            assert (
                json.loads((folder / "adapter_config.json").read_text())["r"] == run.recipe.lora.r
            )
            assert (folder / "README.md").read_text().startswith("---")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rounds: 3", "site.yaml:1: rounds: not a site's to say"),
        ("training: {learning_rate: 1}", "training: not a site's to say"),
        ("data:\n  pth: x", "site.yaml:2: data.pth: not a site's to say"),
        ("batch_size: 0", "batch_size"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_sites_file_may_say_nothing_of_the_federation(text, said, tmp_path):
    (tmp_path / SITE).write_text(text)
    with pytest.raises(FederateError, match=said.replace(".", r"\.")):
        SiteSettings.read(tmp_path / SITE)


def test_a_sites_batch_size_leaves_a_step_what_it_is(smoke):
    recipe = smoke("training.batch_size=8", "training.gradient_accumulation=2")
    training = SiteSettings(batch_size=4, device="cpu").applied(recipe).training
    assert (training.batch_size, training.gradient_accumulation, training.device) == (4, 4, "cpu")
    with pytest.raises(FederateError, match="does not divide the 16 examples"):
        SiteSettings(batch_size=5).applied(recipe)


@pytest.mark.parametrize("name", ["../up", "a/b", "", "server", "a b", "-x", "é"])
def test_names_of_sites_cannot_lead_out_of_their_folder(name):
    with pytest.raises(FederateError, match="is no name for a site"):
        check_names({name: ["a"]})


def test_a_client_is_at_one_site():
    with pytest.raises(FederateError, match="named more than once"):
        check_names({"a": ["x"], "b": ["x"]})


def test_labels_are_agreed_on_by_name():
    assert agree_on_labels([["b", "c"], ["a", "c"]], None) == ["a", "b", "c"]
    assert agree_on_labels([["0", "1"], [str(n) for n in range(12)]], None) == [
        str(n) for n in range(12)
    ]
    assert agree_on_labels([["a"], ["b"]], 3) == ["a", "b", "LABEL_2"]
    with pytest.raises(FederateError, match="3 labels"):
        agree_on_labels([["a", "b"], ["c"]], 2)


def test_no_class_but_ours_may_run_in_a_job():
    from fedmerge_peft.sites.flare.names import CONTROLLER, EXECUTOR

    assert CONTROLLER.startswith(OURS)
    assert EXECUTOR.startswith(OURS)


def test_work_for_another_sites_client_is_refused(smoke, federation_of, loop):
    kit, trainers = federation_of(smoke("rounds=1"), 2)
    transport = loop(trainers)
    go(kit, transport)
    work = next(
        content
        for site, content in transport.sent
        if site == "site-1" and Message.from_bytes(content).kind == "train"
    )
    answer = Message.from_bytes(trainers["site-2"].answer(work))
    assert (answer.kind, answer.facts["refused"]) == ("error", True)
    assert "who is not at this site" in answer.facts["error"]


def test_a_server_cannot_have_less_privacy_than_the_recipe_in_the_kit_says(smoke, federation_of):
    _kit, trainers = federation_of(
        smoke("privacy={mode: local, clip: 0.1, noise: 1}"),
        2,
        settings={"site-1": {"privacy": {"noise": 0.5}}},
    )
    row = torch.zeros(3)
    for weaker in (UpdatePrivacy(1e9, 0.0), UpdatePrivacy(0.1, 0.1)):
        assert trainers["site-1"]._update_privacy(Train(row, privacy=weaker)) == UpdatePrivacy(
            0.1, 0.5
        )
        assert trainers["site-2"]._update_privacy(Train(row, privacy=weaker)) == UpdatePrivacy(
            0.1, 0.2
        )
    assert trainers["site-2"]._update_privacy(
        Train(row, privacy=UpdatePrivacy(0.05, 3.0))
    ) == UpdatePrivacy(0.05, 3.0)
    for plan in (Train(row), Choose(row[None])):
        with pytest.raises(RefusedError, match="the server asks for updates without it"):
            trainers["site-2"]._update_privacy(plan)


def test_a_trainer_wants_data(smoke, federation_of):
    _kit, trainers = federation_of(smoke(), 2)
    with pytest.raises(RefusedError, match="names no data"):
        Trainer(trainers["site-1"].kit, "site-1", SiteSettings())
