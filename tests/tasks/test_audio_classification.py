"""Classification of sounds: their reading, their models, exactness, and whole runs."""

import logging

import numpy as np
import pytest
import torch
from datasets import Audio, Dataset

from equality import assert_near
from fedmerge_peft import Recipe, federate, resume
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.errors import DataError
from fedmerge_peft.recipe.strategies import STRATEGIES
from fedmerge_peft.report.page import write_report
from fedmerge_peft.serving.export import export_client
from fedmerge_peft.tasks.sound import read_sound
from fedmerge_peft.training.batching import clients_per_batch
from fedmerge_peft.training.loop import Job, train
from fedmerge_peft.training.plan import Train
from fedmerge_peft.training.prefix_cache import PrefixCache
from task_bench import TaskBench, assert_same_step
from tasks.made_sounds import (
    KINDS,
    RATE,
    tone,
    write_ast,
    write_folder,
    write_wav2vec2,
    write_wave,
)

NAME = "audio-classification"
LORA = {"target_modules": ["q_proj", "v_proj"]}
MODELS = {
    "masked": (write_wav2vec2, LORA),
    "unmasked": (lambda folder: write_wav2vec2(folder, "group", "Hubert"), LORA),
    "spectrogram": (write_ast, LORA),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audio-models")
    return {kind: write(folder / kind) for kind, (write, _) in MODELS.items()}


def table_of(count=6):
    arrays = [tone(KINDS[n % 3], n) for n in range(count)]
    return Dataset.from_dict({"audio": arrays, "label": [KINDS[n % 3] for n in range(count)]})


@pytest.fixture
def make_bench(models):
    """``make_bench("masked")``: six sounds on a tiny model."""

    def make(kind, table=None, prefix_cache=False, lora=None, **task):
        lora = {**MODELS[kind][1], **(lora or {})}
        section = {"name": NAME, **task}
        return TaskBench(models[kind], table or table_of(), section, lora, prefix_cache)

    return make


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32])
def test_wave_files_of_all_widths_are_the_same_sound(tmp_path, dtype):
    wave = tone("hum", 0)
    path = write_wave(tmp_path / "a.wav", wave, dtype=dtype)
    step = 2 / 2 ** (8 * np.dtype(dtype).itemsize) if np.dtype(dtype).kind != "f" else 0
    assert np.abs(read_sound(path, RATE) - wave).max() <= 1.5 * step + 1e-7
    content = (tmp_path / "a.wav").read_bytes()
    for other in (content, {"path": None, "bytes": content}, {"path": path, "bytes": None}):
        assert np.array_equal(read_sound(other, RATE), read_sound(path, RATE))


def test_channels_are_averaged(tmp_path):
    stereo = np.stack([tone("hum", 0), np.zeros_like(tone("hum", 0))], axis=1)
    path = write_wave(tmp_path / "a.wav", stereo, dtype=np.float32)
    np.testing.assert_allclose(read_sound(path, RATE), tone("hum", 0) / 2, rtol=1e-6)


def cut_off(path):
    write_wave(path, tone("hum", 0))
    path.write_bytes(path.read_bytes()[:-99])
    return str(path)


@pytest.mark.parametrize("length", [0, 2**31 + 28, 2**32 - 1])
def test_a_streamed_file_has_no_length(tmp_path, length):
    path = write_wave(tmp_path / "a.wav", tone("hum", 0))
    content = (tmp_path / "a.wav").read_bytes()
    streamed = content[:4] + length.to_bytes(4, "little") + content[8:]
    assert np.array_equal(read_sound(streamed, RATE), read_sound(path, RATE))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: write_wave(path, tone("hum", 0), rate=8000), "8000 samples per second, and"),
        (lambda path: write_wave(path, tone("hum", 0)[:20]), "shorter than 0.05 seconds"),
        (lambda path: path.write_bytes(b"ID3 no wave") and str(path), "not a WAV file; convert it"),
        (lambda path: path.write_bytes(b"RIFF") and str(path), "damaged WAV file"),
        (cut_off, "a damaged WAV file: 99 of 644 bytes are missing"),
        (lambda path: write_wave(path, np.full(999, 9e3), dtype=np.float32), "range up to 9,000"),
        (lambda path: str(path), "No such file"),
        (lambda path: write_wave(path, np.full(999, np.nan), dtype=np.float32), "not finite"),
    ],
)
def test_other_files_are_refused_with_their_row(models, task_of, tmp_path, make, message):
    rows = [write_wave(tmp_path / "good.wav", tone("hum", 0)), make(tmp_path / "bad.wav")]
    table = Dataset.from_dict({"audio": rows, "label": ["a", "b"]})
    task = task_of("vit", table, folder=models["masked"], name=NAME)
    with pytest.raises(DataError, match=rf"row 1 .*bad\.wav.*{message}"):
        task.encode(table)


def test_arrays_of_integers_are_scaled_by_their_width_or_refused():
    samples = (tone("hum", 0) * 32767).astype(np.int16)
    scaled = read_sound({"array": samples, "sampling_rate": RATE}, RATE)
    np.testing.assert_allclose(scaled, samples / 32768, rtol=1e-6)
    with pytest.raises(ValueError, match="integers without a known range; write fractions"):
        read_sound(samples.tolist(), RATE)
    with pytest.raises(ValueError, match=r"shape \(2, 300\), not \(samples,\) or \(samples, ch"):
        read_sound([tone("hum", 0).tolist()] * 2, RATE)


def test_columns_of_datasets_need_no_further_package(models, task_of, tmp_path):
    path = write_wave(tmp_path / "a.wav", tone("hum", 0))
    paths = Dataset.from_dict({"audio": [path], "label": ["a"]})
    typed = paths.cast_column("audio", Audio(decode=False))
    decoded = Dataset.from_dict(
        {"audio": [{"array": read_sound(path, RATE), "sampling_rate": RATE}], "label": ["a"]}
    )
    task = task_of("vit", paths, folder=models["masked"], name=NAME)
    own, *others = [task.encode(table).columns["input_values"] for table in (paths, typed, decoded)]
    for other in others:
        assert torch.equal(own[0], other[0])


def test_long_sounds_are_cut_and_counted(models, task_of):
    task = task_of("vit", table_of(), folder=models["masked"], name=NAME, max_seconds=0.2)
    examples = task.encode(table_of())
    assert examples.lengths.tolist() == [300, 400, 400] * 2
    assert examples.cuts == {"are longer than 0.2 seconds and were cut": [2, 5]}


@pytest.mark.parametrize(
    ("kind", "padding"), [("masked", "right"), ("unmasked", "none"), ("spectrogram", "right")]
)
def test_padding_follows_from_the_model(make_bench, kind, padding):
    assert make_bench(kind).task.padding == padding


@pytest.mark.equality
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", MODELS)
def test_a_step_equals_one_of_transformers_trainer(make_bench, kind, tmp_path):
    bench = make_bench(kind)
    rows = bench.rows if kind != "unmasked" else np.array([0, 3])  # of one length
    row = bench.row()

    def collate(examples):
        return bench.runtime.collate(np.array([each["row"] for each in examples]))

    plain = bench.plain_peft(row, tmp_path / "adapter")
    bench.task.match_inputs(plain)  # no SpecAugment
    expected = bench.trained_by_transformers(
        plain,
        [{"row": place} for place in rows],
        collate,
        tmp_path / "trainer",
    )
    assert_same_step(bench.trained(row, rows), expected, bench.backbone.layout.state_dict(row))


@pytest.mark.equality
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", ["masked", "spectrogram"])
def test_clients_share_a_pass(make_bench, kind):
    bench = make_bench(kind)
    training = bench.recipe.training.model_copy(update={"clients_per_batch": 2})
    assert clients_per_batch(bench.runtime, training, bench.rows) == 2
    jobs = [
        Job(Train(bench.row(1)), np.array([0, 1, 2]), 0),
        Job(Train(bench.row(2)), np.array([5, 4]), 0),
    ]
    together = train(bench.runtime, bench.recipe.training, jobs)
    for own, job in zip(together, jobs, strict=True):
        (alone,) = train(bench.runtime, bench.recipe.training, [job])
        assert (own.row - alone.row).norm() <= 1e-10 * (alone.row - job.train.row).norm()


@pytest.mark.parametrize("kind", MODELS)
def test_the_frozen_prefix_is_cached_with_the_same_scores(make_bench, kind):
    lora = {"layers_to_transform": [1]}
    plain = make_bench(kind, lora=lora)
    runtime = plain.runtime
    examples = plain.task.finish(plain.backbone.model, runtime.examples, plain.backbone.device)
    expected = plain.scores(plain.row(), batch_size=3)
    runtime.cache = PrefixCache(plain.backbone, plain.task, examples, [plain.rows], 1.0)
    assert plain.scores(plain.row(), batch_size=3) == pytest.approx(expected, rel=1e-5)
    assert runtime.cache.used


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    """A run of a round on a folder of files, one client for each of two parts."""
    folder = tmp_path_factory.mktemp("run")
    write_folder(folder / "data")
    recipe = Recipe.model_validate(
        {
            "name": "sounds",
            "task": {"name": NAME, "metrics": ["accuracy", "expected_calibration_error"]},
            "rounds": 1,
            "backbone": {"model": str(models["masked"])},
            "lora": {"r": 4, **LORA, "layers_to_transform": [1, 2]},
            "data": {
                "path": str(folder / "data"),
                "test_fraction": 0.25,
                "partition": {"scheme": "iid", "clients": 2},
            },
            "strategy": {"name": "fedmerge", "adapters": 2},
            "baselines": ["local"],
            "training": {"learning_rate": 0.01, "batch_size": 2, "steps": 1, "device": "cpu"},
        }
    )
    engine = LocalEngine.from_recipe(recipe)
    return federate(recipe, folder / "run", engine=engine), engine


def test_a_folder_for_each_label_is_read(finished):
    _, engine = finished
    assert engine.task.labels == KINDS
    assert engine.runtime.cache is not None
    assert engine.runtime.cache.used


def test_an_export_loads_in_plain_peft_with_the_same_logits(finished, tmp_path):
    run, engine = finished
    batch = engine.runtime.collate(np.arange(4))
    del batch["labels"]
    name = run.client_names[0]
    card = (export_client(run, name, tmp_path / "out") / "README.md").read_text()
    scope = {}
    exec(card.partition("```python\n")[2].partition("```")[0], scope)
    soup, weights = run.state()
    engine.backbone.load_row(soup.merge(weights[0]))
    engine.backbone.eval()
    with torch.no_grad():
        found = scope["model"].eval()(**batch).logits
        assert_near(found, engine.backbone.model(**batch).logits)


def test_predictions_are_those_of_transformers_pipeline(finished, tmp_path):
    run, _ = finished
    wave = tone("whistle", 1)
    path = write_wave(tmp_path / "a.wav", wave, dtype=np.float32)
    inputs = [path, wave, {"array": wave, "sampling_rate": RATE}]
    name = run.client_names[0]
    found = run.predict({name: inputs}, device="cpu")[name]
    assert len({prediction["label"] for prediction in found}) == 1
    scores = [prediction["score"] for prediction in found]
    assert scores == pytest.approx(scores[:1] * 3, rel=1e-5)  # rows of a batch may round apart
    (expected, *_) = run.client(name).pipeline(device="cpu")(wave, top_k=1)
    assert found[0]["label"] == expected["label"]
    assert found[0]["score"] == pytest.approx(expected["score"], rel=1e-3)
    with pytest.raises(DataError, match="path of a WAV file"):
        run.predict({name: [3]}, device="cpu")


def test_a_report_has_the_confusion_of_the_sounds(finished, tmp_path):
    run, _ = finished
    page = write_report([run], tmp_path / "report.html").read_text()
    assert '<table class="matrix">' in page
    assert "test examples are labeled right" in page


def test_a_run_is_resumed_with_more_rounds(finished, caplog):
    run, engine = finished
    with caplog.at_level(logging.WARNING):
        longer = resume(run.path, ["rounds=2"], engine=engine)
    assert len(longer.records) == 2
    assert not caplog.records


@pytest.mark.slow
@pytest.mark.parametrize("name", [entry.name for entry in STRATEGIES])
def test_all_strategies_run_on_sounds(finished, tmp_path, name):
    _, engine = finished
    options = {"adapters": 2} if "adapters" in STRATEGIES[name].recipe.model_fields else {}
    recipe = engine.recipe.model_copy(update={"baselines": []})
    recipe = Recipe.model_validate(
        {**recipe.model_dump(), "rounds": 2, "strategy": {"name": name, **options}}
    )
    own = engine.with_recipe(recipe)
    run = federate(recipe, tmp_path / "run", engine=own)
    assert run.last_scores["mean"] >= 0
    if recipe.strategy.single_adapter:
        client = run.client_names[0]
        found = run.predict({client: [tone("hum", 1)]}, device="cpu")
        assert found[client][0]["label"] in KINDS
