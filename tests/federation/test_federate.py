"""A run's directory, from the first round to the exported adapter."""

import dataclasses
import json
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from equality import assert_near
from federation.small_recipe import recipe
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
from fedmerge_peft.runs.environment import source
from fedmerge_peft.runs.writer import RunWriter
from fedmerge_peft.util import files


@pytest.fixture(scope="module")
def run(tmp_path_factory, engine):
    return federate(
        recipe("rounds=3", "baselines=[fedavg, local]"),
        tmp_path_factory.mktemp("runs") / "first",
        engine=engine,
    )


def test_a_run_writes_all_of_its_files(run):
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


def test_the_environment_records_time_code_and_machine(run):
    environment = load_run(run.path).environment
    assert {
        "started",
        "python",
        "platform",
        "processor",
        "device",
        "threads",
        "packages",
    } <= environment.keys()
    assert environment["started"].endswith("Z")
    assert environment["packages"]["fedmerge-peft"] == version("fedmerge-peft")
    assert {key: environment[key] for key in ("commit", "dirty") if key in environment} == source(
        Path(files.__file__).parent
    )


def git(folder, *arguments):
    me = ["-c", "user.name=me", "-c", "user.email=me@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", *me, *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_checkout_is_identified_by_its_commit_and_uncommitted_changes(tmp_path):
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


def test_metrics_hold_one_object_per_round(run):
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
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


def test_the_recipe_in_the_run_directory_is_complete(run):
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
    """A layer's output under the exact adapter is the weighted mean over the soup's adapters."""
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


def test_an_unknown_client_has_no_adapter(run):
    with pytest.raises(RunError, match="no client 'nobody'; it has Harbour Clinic"):
        run.adapter("nobody")


def test_an_existing_run_is_never_overwritten(run, engine):
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(RunExistsError, match=r"already holds a run.*such as .*first-2"):
        federate(recipe(), run.path, engine=engine)
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_a_directory_with_other_files_is_refused(tmp_path, engine):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunExistsError, match="already holds other files"):
        federate(recipe(), tmp_path, engine=engine)


def test_a_directory_that_cannot_be_written_is_one_error(tmp_path, engine):
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


def test_a_full_disk_is_one_error_and_loses_no_finished_round(tmp_path, engine, monkeypatch):
    from fedmerge_peft.util import files as module

    def full(tensors, path, **settings):
        if path.name.startswith(".round-00002"):
            raise OSError(28, "No space left on device")
        save_file(tensors, path, **settings)

    save_file = module.save_file
    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(
        RunError,
        match=(
            r"round-00002.safetensors cannot be written \(No space left on device\); "
            r"finished rounds of a run are intact"
        ),
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
    with pytest.raises(RunError, match=r"metrics\.jsonl is damaged: it lacks finished rounds"):
        load_run(run.path).records  # noqa: B018
    for name in ("round-00002.safetensors", "round-00002.soup.safetensors"):
        (run.path / "checkpoint" / name).unlink()
    (run.path / "summary.json").unlink()
    assert [record["round"] for record in load_run(run.path).records] == [1]


@pytest.mark.parametrize("name", ["../../elsewhere", ".."])
def test_a_name_outside_the_folder_is_refused(engine, name):
    with pytest.raises(RecipeError, match="not a valid folder name"):
        federate(recipe(f"name={name}"), engine=engine)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="holds no run"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        ("femam", r"^the baseline femam: lora\.r: femam splits the ranks"),
        (
            "{name: flexlora, ranks: [1, 9]}",
            r"^baselines\[2\]\.ranks: 9 exceeds the adapter's rank",
        ),
    ],
)
def test_a_baseline_that_cannot_start_is_refused_before_the_first_round(
    smoke, tmp_path, baseline, message
):
    with pytest.raises(RecipeError, match=message):
        federate(smoke("lora.r=2", f"baselines=[fedmerge, fedavg, {baseline}]"), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
