"""The round loop, the local engine and the run directory together, on tiny random models."""

import dataclasses
import json
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from equality import assert_near
from fedmerge_peft import (
    ClientError,
    Federation,
    Recipe,
    RecipeError,
    RunError,
    RunExistsError,
    federate,
    load_run,
)
from fedmerge_peft.engines.assignments import Assignment
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.runs.environment import source
from fedmerge_peft.runs.writer import RunWriter
from fedmerge_peft.training.plan import Train
from fedmerge_peft.util import files

SMALL = [
    "data.max_train=8",
    "data.max_test=6",
    "data.filter.provider=[Alder, Birch]",
    "strategy.adapters=3",
    "training.device=cpu",
    "baselines=[]",
]


def recipe(*overrides):
    return Recipe.load("smoke", [*SMALL, *overrides])


@pytest.fixture(scope="module")
def engine():
    return LocalEngine.from_recipe(recipe())


def same(one, two):
    return torch.equal(one.strategy.soup.rows, two.strategy.soup.rows) and torch.equal(
        one.strategy.weights, two.strategy.weights
    )


@pytest.mark.equality
def test_same_seed_same_bits_from_loading_to_the_last_round():
    first, second = Federation(recipe()), Federation(recipe())
    ours, theirs = list(first.rounds()), list(second.rounds())
    assert same(first, second)
    assert [record.served for record in ours] == [record.served for record in theirs]


def test_another_seed_gives_another_federation(engine):
    first, second = Federation(recipe(), engine), Federation(recipe("seed=1"))
    assert not torch.equal(first.strategy.soup.rows, second.strategy.soup.rows)
    assert [client.name for client in first.engine.clients] == [
        client.name for client in second.engine.clients
    ]


@pytest.mark.parametrize(
    "override", ["training.learning_rate=0.5", "seed=1", "lora.r=4", "evaluation.finetuned=false"]
)
def test_an_engine_loaded_for_another_recipe_is_refused(engine, override):
    with pytest.raises(
        RecipeError,
        match=rf"{override.split('.')[0].split('=')[0]}: the engine was loaded for a recipe that says otherwise",
    ):
        Federation(recipe(override), engine)


@pytest.mark.equality
def test_what_a_client_does_does_not_depend_on_who_else_takes_part(engine):
    row = engine.strategy_context().fresh_row(0)
    _, alone = next(engine.train_clients(1, [(2, Assignment(Train(row)))]))
    plans = [(client, Assignment(Train(row), row)) for client in (0, 1, 2)]
    _, among = list(engine.train_clients(1, plans))[2]
    assert torch.equal(alone.delta, among.delta)


@pytest.mark.equality
def test_one_adapter_is_fedavg_to_the_end(engine):
    one, fedavg = (
        Federation(recipe("strategy.adapters=1"), engine),
        Federation(recipe("strategy=fedavg"), engine),
    )
    list(one.rounds())
    list(fedavg.rounds())
    torch.testing.assert_close(one.strategy.adapter(0), fedavg.strategy.adapter(0))


@pytest.mark.equality
def test_identical_starts_stay_fedavg_through_real_training(engine):
    sgd = ["training.optimizer=sgd", "training.learning_rate=0.1"]
    recipes = recipe("strategy.start=identical", *sgd), recipe("strategy=fedavg", *sgd)
    same_start, fedavg = (Federation(each, engine.with_recipe(each)) for each in recipes)
    start = fedavg.strategy.adapter(3).clone()
    list(same_start.rounds())
    list(fedavg.rounds())
    assert_near(same_start.strategy.adapter(3), fedavg.strategy.adapter(3), start)
    torch.testing.assert_close(same_start.strategy.weights, torch.full((6, 3), 1 / 3))


def test_merged_scores_are_of_what_was_sent_and_finetuned_of_what_was_trained(engine):
    federation = Federation(recipe(), engine)
    sent = dict(
        engine.evaluate_clients(
            (client, federation.strategy.adapter(client)) for client in range(6)
        )
    )
    record = next(federation.rounds())
    assert record.served.clients == {
        engine.clients[client].name: scores for client, scores in sent.items()
    }
    assert record.finetuned.clients != record.served.clients
    values = [scores["test_accuracy"] for scores in record.served.clients.values()]
    assert record.served.mean == pytest.approx(sum(values) / 6)
    assert (
        record.served.worst
        == min(values)
        == record.served.clients[record.served.worst_client]["test_accuracy"]
    )


def test_only_one_adapter_travels_each_way(engine):
    record = next(Federation(recipe(), engine).rounds())
    assert record.bytes_down == record.bytes_up == 6 * 4 * engine.backbone.layout.size
    assert next(Federation(recipe("strategy=local"), engine).rounds()).bytes_down == 0


def test_a_fraction_of_the_clients_is_drawn_anew_each_round(engine):
    federation = Federation(recipe("clients.fraction=0.5", "rounds=6"), engine)
    cohorts = [federation.cohort(number) for number in range(1, 7)]
    assert all(len(cohort) == 3 for cohort in cohorts)
    assert len({tuple(cohort) for cohort in cohorts}) > 1
    assert [record.clients for record in federation.rounds()] == [
        [engine.clients[i].name for i in cohort] for cohort in cohorts
    ]


def test_rounds_without_measuring_have_no_scores(engine):
    records = list(Federation(recipe("rounds=5", "evaluation.every=3"), engine).rounds())
    assert [record.served is not None for record in records] == [True, False, True, False, True]


def test_a_failing_client_is_named_with_its_round_and_cause(engine, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("no luck")

    monkeypatch.setattr("fedmerge_peft.engines.local.train", fail)
    with pytest.raises(
        ClientError, match=r"client Harbour Clinic, round 1: ZeroDivisionError: no luck"
    ) as caught:
        list(Federation(recipe(), engine).rounds())
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_client_that_cannot_be_measured_is_named_with_the_rounds_completed(engine, monkeypatch):
    federation = Federation(recipe("rounds=2", "evaluation.every=5"), engine)
    list(federation.rounds())

    def fail(*_):
        raise ZeroDivisionError("no luck")

    monkeypatch.setattr("fedmerge_peft.engines.local.evaluate", fail)
    with pytest.raises(
        ClientError,
        match=r"client Harbour Clinic, round 2: evaluation after the round: ZeroDivisionError: no luck",
    ) as caught:
        federation.evaluate()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert caught.value.round == 2


def test_an_adapter_that_is_not_finite_never_reaches_the_soup():
    federation = Federation(
        recipe(
            "training.learning_rate=1e30", "training.optimizer=sgd", "training.max_grad_norm=null"
        )
    )
    with pytest.raises(
        ClientError, match=r"not finite after training; lower training\.learning_rate"
    ):
        list(federation.rounds())
    assert federation.strategy.soup.rows.isfinite().all()


# ---- the run directory ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory, engine):
    return federate(
        recipe("rounds=3", "baselines=[fedavg, local]"),
        tmp_path_factory.mktemp("runs") / "first",
        engine=engine,
    )


def test_a_run_leaves_everything_behind(run):
    names = {
        path.relative_to(run.path).as_posix() for path in run.path.rglob("*") if path.is_file()
    }
    assert {
        "recipe.yaml",
        "environment.json",
        "clients.json",
        "adapter_config.json",
        "metrics.jsonl",
        "weights/round-00003.safetensors",
        "soup.safetensors",
        "weights.safetensors",
        "best/soup.safetensors",
        "summary.json",
        "baselines/fedavg/summary.json",
        "baselines/local/summary.json",
    } <= names
    assert not [name for name in names if "/." in name or name.startswith(".")]


def test_the_environment_says_when_and_by_what_a_run_was_made(run):
    said = load_run(run.path).environment
    assert {
        "started",
        "python",
        "platform",
        "processor",
        "device",
        "threads",
        "packages",
    } <= said.keys()
    assert said["started"].endswith("Z")
    assert said["packages"]["fedmerge-peft"] == version("fedmerge-peft")
    assert {key: said[key] for key in ("commit", "dirty") if key in said} == source(
        Path(files.__file__).parent
    )


def git(folder, *arguments):
    me = ["-c", "user.name=me", "-c", "user.email=me@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", *me, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_checkout_is_known_by_its_commit_and_by_changes_in_the_package(tmp_path):
    package = tmp_path / "src" / "package"
    package.mkdir(parents=True)
    (package / "code.py").touch()
    assert source.__wrapped__(package) == {}  # no checkout
    git(tmp_path, "init")
    assert source.__wrapped__(package) == {}  # installed below somebody's repository
    git(tmp_path, "add", "src")
    git(tmp_path, "commit", "-m", "code")
    (tmp_path / "notes.txt").touch()
    assert source.__wrapped__(package) == {
        "commit": git(tmp_path, "rev-parse", "HEAD"),
        "dirty": False,
    }
    (package / "more.py").touch()
    assert source.__wrapped__(package)["dirty"]


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert source.__wrapped__(Path(files.__file__).parent) == {}


def test_metrics_hold_one_object_a_round(run):
    records = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [record["round"] for record in records] == [1, 2, 3]
    expected = {
        "seconds",
        "train_loss",
        "served",
        "finetuned",
        "weights_entropy",
        "adapter_mass",
        "bytes_down",
        "bytes_up",
    }
    assert expected <= records[0].keys()
    assert {"mean", "worst", "clients"} <= records[0]["served"].keys()


def test_the_recipe_in_the_run_directory_is_the_whole_recipe(run):
    assert Recipe.load(run.path / "recipe.yaml") == recipe("rounds=3", "baselines=[fedavg, local]")


def test_frames_show_rounds_clients_and_weights(run):
    again = load_run(run.path)
    assert list(again.metrics.index) == [1, 2, 3]
    assert again.clients.loc["Harbour Clinic", "group"] == "Alder"
    assert again.clients["test_accuracy"].between(0, 1).all()
    assert again.weights.shape == (6, 3)
    assert again.weights.sum(axis=1).to_list() == pytest.approx([1.0] * 6)
    assert len(list(again.weights_by_round())) == 3
    assert "<table" in again._repr_html_()
    assert set(again.baselines) == {"fedavg", "local"}


def test_the_best_round_has_the_lowest_mean_validation_loss(run):
    candidates = [
        (record["served"]["validation_loss"], record["round"] - 1) for record in run.records
    ]
    candidates.append((run.summary["final"]["served"]["validation_loss"], 3))
    assert run.summary["best"]["after_round"] == min(candidates)[1]


def test_a_saved_adapter_loads_in_plain_peft_and_gives_the_same_logits(
    run, engine, tiny_models, tmp_path
):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    run.save_adapter("Lantern Logistics", tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(
        tiny_models / "bert", num_labels=len(engine.task.labels)
    )
    plain = PeftModel.from_pretrained(plain, tmp_path).eval()
    names = [client.name for client in engine.clients]
    engine.backbone.load_row(
        run.soup.merge(torch.tensor(run.weights.to_numpy())[names.index("Lantern Logistics")])
    )
    tokens = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert_near(plain(input_ids=tokens).logits, engine.backbone.model(input_ids=tokens).logits)


@pytest.mark.equality
def test_an_exact_adapter_is_the_average_of_updates_in_plain_peft(
    run, engine, tiny_models, tmp_path
):
    """The features of a layer under the exact adapter are the weighted mean of those under each adapter of the soup."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    run.save_adapter("Lantern Logistics", tmp_path, exact=True)
    plain = AutoModelForSequenceClassification.from_pretrained(
        tiny_models / "bert", num_labels=len(engine.task.labels)
    )
    plain = PeftModel.from_pretrained(plain, tmp_path).eval()
    layer = plain.get_base_model().bert.encoder.layer[0].attention.self.query
    hidden = torch.randn(1, 3, 32)
    weights = run.weights.loc["Lantern Logistics"]
    ours = engine.backbone.model.get_base_model().bert.encoder.layer[0].attention.self.query
    expected = torch.zeros(1, 3, 32)
    with torch.no_grad():
        for row, weight in zip(run.soup.rows, weights, strict=True):
            engine.backbone.load_row(row)
            expected += weight * ours(hidden)
        assert_near(layer(hidden), expected)


def test_a_stranger_has_no_adapter(run):
    with pytest.raises(RunError, match="no client 'nobody'; it has Harbour Clinic"):
        run.adapter("nobody")


def test_an_existing_run_is_never_overwritten(run, engine):
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(RunExistsError, match=r"already holds a run.*--out .*first-2"):
        federate(recipe(), run.path, engine=engine)
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_a_directory_with_other_files_is_left_alone(tmp_path, engine):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunExistsError, match="already holds other files"):
        federate(recipe(), tmp_path, engine=engine)


def test_a_directory_that_cannot_be_written_is_one_clear_error(tmp_path, engine):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        federate(recipe(), tmp_path / "file" / "run", engine=engine)


def test_a_failure_in_the_middle_loses_no_finished_round(tmp_path, engine, monkeypatch):
    from fedmerge_peft.engines import local

    train = local.train
    calls = []

    def fail_late(*args):
        calls.append(1)
        if len(calls) > 15:  # in the third round of six clients
            raise RuntimeError("power cut")
        return train(*args)

    monkeypatch.setattr(local, "train", fail_late)
    with pytest.raises(ClientError, match="round 3: RuntimeError: power cut"):
        federate(recipe("rounds=4"), tmp_path / "run", engine=engine)
    left = load_run(tmp_path / "run")
    assert [record["round"] for record in left.records] == [1, 2]
    assert left.soup.rows.isfinite().all()
    with pytest.raises(RunError, match="has not ended: 2 of 4 rounds"):
        _ = left.summary


def test_a_full_disk_is_one_clear_error_and_loses_no_finished_round(tmp_path, engine, monkeypatch):
    from fedmerge_peft.util import files as module

    def full(tensors, path, **_):
        if path.name.startswith(".round-00002"):
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    save_file = module.save_file
    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(
        RunError,
        match=r"round-00002.safetensors cannot be written \(No space left on device\); finished rounds are intact",
    ):
        federate(recipe("rounds=3"), tmp_path / "run", engine=engine)
    assert [record["round"] for record in load_run(tmp_path / "run").records] == [1]
    assert not list((tmp_path / "run").rglob(".*"))


def test_the_best_round_is_chosen_among_scores_of_all_clients(tmp_path, engine):
    run = federate(recipe("rounds=3", "clients.fraction=0.2"), tmp_path / "run", engine=engine)
    assert run.summary["best"]["after_round"] == 3
    assert len(run.summary["best"]["served"]["clients"]) == 6


def test_a_loss_that_is_not_finite_is_never_the_best(tmp_path, engine):
    federation = Federation(recipe(), engine)
    run = RunWriter(tmp_path / "run", recipe())
    run.begin(engine, federation.strategy)
    scores = federation.evaluate()
    run.save_if_best(
        0, dataclasses.replace(scores, validation_loss=float("nan")), federation.strategy
    )
    run.save_if_best(1, dataclasses.replace(scores, validation_loss=1.0), federation.strategy)
    run.save_if_best(
        2, dataclasses.replace(scores, validation_loss=float("nan")), federation.strategy
    )
    assert json.loads((tmp_path / "run" / "best" / "scores.json").read_text())["after_round"] == 1


def test_a_torn_last_line_of_metrics_is_left_out(tmp_path, engine):
    run = federate(recipe(), tmp_path / "run", engine=engine)
    path = run.path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert [record["round"] for record in load_run(run.path).records] == [1]


@pytest.mark.parametrize("name", ["../../elsewhere", "..", "''"])
def test_a_name_that_leads_elsewhere_is_refused(engine, name):
    with pytest.raises(RecipeError, match="not a valid folder name"):
        federate(recipe(f"name={name}"), engine=engine)


def test_a_run_that_ends_while_warming_says_so(engine):
    records = list(
        Federation(recipe("strategy.start=warm", "strategy.warm_rounds=3"), engine).rounds()
    )
    assert records[-1].warnings == [
        "until clients are grouped after round 3, fedmerge equals FedAvg; completed rounds: 2"
    ]


def test_a_folder_without_a_run_is_one_clear_error(tmp_path):
    with pytest.raises(RunError, match="holds no run"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("gpt2", ["lora.target_modules=[c_attn]"]),
        ("llama", ["lora.target_modules=[q_proj, v_proj]"]),
    ],
)
def test_decoders_classify_too(kind, overrides):
    federation = Federation(recipe("rounds=1", f"backbone.model=tiny:{kind}", *overrides))
    assert next(federation.rounds()).served.mean >= 0


@pytest.mark.parametrize("merge", ["factor", "shared_a"])
def test_both_merge_modes_train(merge):
    federation = Federation(recipe("rounds=2", f"lora.merge={merge}"))
    before = federation.strategy.soup.rows.clone()
    list(federation.rounds())
    assert not torch.equal(federation.strategy.soup.rows, before)
    assert (len(federation.strategy.soup.shared) > 0) == (merge == "shared_a")
