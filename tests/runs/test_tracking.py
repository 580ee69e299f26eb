"""Trackers receive the numbers of each round, and their failures do not end a run."""

import logging
import sys
from io import BytesIO
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from fedmerge_peft import RecipeError, RunError, federate, load_run, resume
from fedmerge_peft.recipe.schema import Tracker
from fedmerge_peft.runs import tracking as module
from fedmerge_peft.runs.cleanup import check_only_run_files

ROUNDS = ["rounds=2", "strategy.adapters=3"]


@pytest.fixture
def tracked(monkeypatch, smoke, smoke_engine, tmp_path):
    """``tracked()``: a run whose tracker, in place of tensorboard, collects the calls in a list."""
    from accelerate import tracking as accelerates

    calls = []

    class Listing(accelerates.GeneralTracker):
        name = "tensorboard"
        requires_logging_directory = True
        fails = False

        def __init__(self, project, logging_dir, **_):
            super().__init__()
            calls.append(("start", project, logging_dir))

        tracker = None

        def store_init_configuration(self, values):
            calls.append(("configuration", values))

        def log(self, values, step=None, **_):
            if Listing.fails:
                raise ConnectionError("no route")
            calls.append((step, values))

        def log_images(self, values, **_):
            pass

        def finish(self):
            calls.append(("finish",))

    monkeypatch.setitem(accelerates.LOGGER_TYPE_TO_CLASS, "tensorboard", Listing)
    monkeypatch.setattr(accelerates, "_available_trackers", [accelerates.LoggerType.TENSORBOARD])
    monkeypatch.setattr(module, "find_spec", lambda _: object())

    def run(*overrides):
        return federate(
            smoke(*ROUNDS, "tracking=[tensorboard]", *overrides),
            tmp_path / "run",
            engine=smoke_engine,
        )

    run.calls, run.tracker = calls, Listing
    return run


def test_a_tracker_receives_the_numbers_of_every_round_at_its_step(tracked):
    run = tracked()
    start, configuration, first, second, final, finish = tracked.calls
    assert start[:2] == ("start", "smoke")
    assert configuration[1]["strategy.adapters"] == 3
    assert all(isinstance(value, str | int | float) for value in configuration[1].values())
    assert [first[0], second[0], final[0]] == [1, 2, 2]
    record = run.records[0]
    assert first[1]["train_loss"] == record["train_loss"]
    assert first[1]["served/test_accuracy_mean"] == record["served"]["mean"]
    assert first[1]["mass/adapter_2"] == record["adapter_mass"][2]
    assert final[1]["final/test_accuracy_worst"] == run.summary["final"]["served"]["worst"]
    assert finish == ("finish",)


def test_each_baseline_is_a_run_of_its_own(tracked):
    tracked("baselines=[fedavg]")
    assert [call[1]["strategy.name"] for call in tracked.calls if call[0] == "configuration"] == [
        "fedmerge",
        "fedavg",
    ]


def test_a_tracker_that_fails_is_disabled_and_the_run_continues(tracked, caplog):
    tracked.tracker.fails = True
    with caplog.at_level(logging.WARNING, "fedmerge_peft"):
        run = tracked()
    assert run.ended
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning == (
        "tracking: tensorboard failed and is disabled for the rest of the run: "
        "ConnectionError: no route"
    )


def test_a_tracker_that_does_not_start_is_one_message(tracked, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError("not logged in\nmore")

    monkeypatch.setattr(tracked.tracker, "__init__", refuse)
    with pytest.raises(RunError, match=r"tensorboard cannot be started \(not logged in\); set"):
        tracked()


def test_a_resumed_run_can_be_tracked_from_then_on(tracked, smoke, smoke_engine, tmp_path):
    federate(smoke(*ROUNDS), tmp_path / "run", engine=smoke_engine)
    resume(tmp_path / "run", ["rounds=3", "tracking=[tensorboard]"], engine=smoke_engine)
    assert [call[0] for call in tracked.calls if isinstance(call[0], int)] == [3, 3]
    assert load_run(tmp_path / "run").recipe.tracking == ["tensorboard"]


def test_a_missing_tracker_is_named_before_anything_loads(smoke, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    fault = "comet_ml, aim cannot be imported: pip install comet-ml aim, or remove them"
    with pytest.raises(RecipeError, match=fault):
        federate(smoke("tracking=[comet_ml, aim]"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tensorboard_reads_the_logged_run(smoke, smoke_engine, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = federate(smoke(*ROUNDS, "tracking=[tensorboard]"), tmp_path / "run", engine=smoke_engine)
    check_only_run_files(run.path)
    events = EventAccumulator(str(run.path / "tracking" / "smoke"))
    events.Reload()
    assert [event.step for event in events.Scalars("train_loss")] == [1, 2]
    assert events.Scalars("final/test_accuracy_mean")[0].value == pytest.approx(
        run.summary["final"]["served"]["mean"]
    )
    images = (
        events.Images("merging_weights/0")
        if "merging_weights/0" in events.Tags()["images"]
        else events.Images("merging_weights")
    )
    assert [image.step for image in images] == [1, 2]
    assert len({image.encoded_image_string for image in images}) == 2
    shown = Image.open(BytesIO(images[-1].encoded_image_string))
    assert min(shown.size) > 200
    assert len(shown.convert("RGB").getcolors(1 << 20)) > 10


def test_mlflow_reads_the_logged_run(smoke, smoke_engine, tmp_path, monkeypatch):
    """MLflow with a file store, without a server."""
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    from mlflow import MlflowClient

    run = federate(
        smoke(*ROUNDS, "tracking=[mlflow]", "baselines=[fedavg]"),
        tmp_path / "run",
        engine=smoke_engine,
    )
    client = MlflowClient((tmp_path / "mlruns").as_uri())
    (experiment,) = client.search_experiments(filter_string="name = 'smoke'")
    tracked = {each.info.run_name: each for each in client.search_runs([experiment.experiment_id])}
    assert set(tracked) == {"fedmerge-seed0", "fedavg-seed0"}
    ours = tracked["fedmerge-seed0"]
    assert ours.info.status == "FINISHED"
    assert ours.data.params["strategy.adapters"] == "3"
    losses = client.get_metric_history(ours.info.run_id, "train_loss")
    assert [(each.step, each.value) for each in losses] == [
        (record["round"], record["train_loss"]) for record in run.records
    ]
    assert ours.data.metrics["final/test_accuracy_mean"] == run.summary["final"]["served"]["mean"]
    pictures = [each.path for each in client.list_artifacts(ours.info.run_id, "merging_weights")]
    assert pictures == ["merging_weights/round-00001.png", "merging_weights/round-00002.png"]
    # fedavg learns no weights
    assert client.list_artifacts(tracked["fedavg-seed0"].info.run_id) == []


@pytest.mark.parametrize("name", ["wandb", "swanlab", "aim", "clearml"])
def test_other_trackers_receive_the_heat_map_in_their_format(name):
    """Images as Accelerate passes them: a list to some trackers, single images to others."""
    shown = []

    class Pictures:
        def log_images(self, values, step):
            shown.append((values["merging_weights"], step))

    tracker = Pictures()
    tracker.name = name
    module.Tracking([tracker]).weights(torch.eye(3), ["a", "b", "c"], 4)
    ((images, step),) = shown
    assert step == 4
    image = images if name in ("aim", "clearml") else images[0]
    assert (image.ndim, image.shape[2], image.dtype) == (3, 3, "uint8")


def test_images_go_to_trackers_directly_where_accelerate_has_no_call(monkeypatch):
    """trackio 0.43, comet_ml 3.58 and dvclive 3.49 receive images through their own calls."""
    shown = []

    class Own:
        def __init__(self, name):
            self.name, self.tracker = name, self

        def log(self, values, step):
            shown.append((self.name, values["merging_weights"].pixels, step))

        def log_image(self, *given, **named):
            shown.append((self.name, *given, named))

    monkeypatch.setitem(
        sys.modules, "trackio", SimpleNamespace(Image=lambda pixels: SimpleNamespace(pixels=pixels))
    )
    module.Tracking(map(Own, ("trackio", "comet_ml", "dvclive"))).weights(
        torch.eye(3), ["a", "b", "c"], 4
    )
    (trackio, comet, live) = shown
    assert (trackio[0], trackio[2]) == ("trackio", 4)
    assert (comet[0], comet[2]) == ("comet_ml", {"name": "merging_weights", "step": 4})
    assert live[:2] == ("dvclive", "merging_weights/round-00004.png")
    assert [
        (image.ndim, image.shape[2], image.dtype) for image in (trackio[1], comet[1], live[2])
    ] == [(3, 3, "uint8")] * 3


def test_the_recipe_accepts_the_trackers_of_accelerate():
    from typing import get_args

    assert set(get_args(Tracker)) == set(module.TRACKERS)
