"""Bad input exits with code 2, one message and no traceback."""

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from fedmerge_peft.cli import main

ROWS = {
    "text": [f"ticket {n} about the printer" for n in range(24)],
    "team": [n % 3 for n in range(24)],
    "site": ["a", "b"] * 12,
}
RECIPE = """\
name: mine
task:
  name: sequence-classification
  label: team
backbone:
  model: tiny:bert
lora:
  target_modules: [query, value]
data:
  path: rows.csv
  partition:
    scheme: natural
    by: site
rounds: 1
training:
  device: cpu
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Dataset.from_dict(ROWS).to_csv("rows.csv")
    (tmp_path / "mine.yaml").write_text(RECIPE)
    return tmp_path


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["run", *arguments])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def test_the_recipe_itself_runs(folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["run", "mine.yaml"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "round 1/1" in shown
    assert "run directory: runs/mine" in shown


BAD_OVERRIDES = {
    "misspelled key": (
        ["training.learnin_rate=1"],
        ["training.learnin_rate", "did you mean 'learning_rate'"],
    ),
    "wrong type": (["rounds=many"], ["rounds", "a whole number"]),
    "missing file": (["data.path=nowhere.csv"], ["nowhere.csv", "data.path"]),
    "missing label column": (["task.label=tema"], ["tema", "team"]),
    "missing text column": (["task.text=body"], ["body", "text"]),
    "label out of range": (["task.num_labels=2"], ["2", "team", "num_labels"]),
    "more clients than examples": (["data.partition={scheme: iid, clients: 100}"], ["100", "24"]),
    "empty client": (
        ["data.partition={scheme: dirichlet, clients: 8, alpha: 0.01, min_examples: 3}"],
        ["min_examples", "alpha"],
    ),
    "unmergeable option": (["lora.init_lora_weights=pissa"], ["pissa", "is not supported"]),
    "target module that is not there": (
        ["lora.target_modules=[q_proj]"],
        ["q_proj", "query, key, value, dense"],
    ),
    "max_length beyond the model": (["task.max_length=4000"], ["4000", "128"]),
    "GPU that is absent": (["training.device=cuda:7"], ["training.device", "cuda:7"]),
    "half precision on a CPU": (["training.mixed_precision=fp16"], ["fp16 needs a CUDA GPU"]),
    "a model folder without a model": (
        ["backbone.model=./runs"],
        ["backbone.model", "config.json"],
    ),
    "a tiny model of no kind": (["backbone.model=tiny:foo"], ["backbone.model", "bert"]),
    "a model that does not exist": (["backbone.model=nobody/nothing"], ["nobody/nothing"]),
    "an empty name": (["name="], ["name", "text"]),
    "an empty path": (["data.path=''"], ["data.path", "text (1 or more characters)"]),
    "a URL": (["data.path=https://site.test/rows.csv"], ["is a URL; download the file"]),
    "the working directory as a run": (["--out", ""], ["already holds other files", "--out "]),
    "unknown strategy": (["strategy=fedmurge"], ["fedmurge", "fedmerge"]),
}


@pytest.mark.parametrize(("overrides", "words"), BAD_OVERRIDES.values(), ids=BAD_OVERRIDES.keys())
def test_bad_input_is_one_clear_message(folder, capsys, overrides, words):
    message = fails(capsys, "mine.yaml", *overrides)
    assert all(word in message for word in words), message
    assert len(message.strip().splitlines()) <= 2
    assert not (folder / "runs").exists()


def test_a_full_output_directory_is_left_alone(folder, capsys):
    (folder / "taken").mkdir()
    (folder / "taken" / "notes.txt").write_text("mine")
    message = fails(capsys, "mine.yaml", "--out", "taken")
    assert "already holds other files" in message
    assert "fedmerge run mine.yaml --out taken-2" in message


def test_a_file_name_may_contain_brackets(folder, capsys):
    (folder / "rows.csv").rename(folder / "rows[1].csv")
    with pytest.raises(SystemExit) as stopped:
        main(["run", "mine.yaml", "data.path=rows[1].csv", "--quiet"])
    assert stopped.value.code == 0, capsys.readouterr().err


def test_all_errors_of_a_file_are_listed_with_their_lines(folder, capsys):
    (folder / "mine.yaml").write_text(
        RECIPE.replace("rounds: 1", "rounds: one").replace("by: site", "buy: site")
    )
    message = fails(capsys, "mine.yaml")
    assert "mine.yaml:13: data.partition.buy" in message
    assert "mine.yaml:14: rounds" in message


def test_truncated_texts_are_counted_in_a_warning(folder, capsys):
    rows = {**ROWS, "text": ["word " * 500, *ROWS["text"][1:]]}
    Dataset.from_dict(rows).to_csv("rows.csv")
    with pytest.raises(SystemExit) as stopped:
        main(["run", "mine.yaml"])
    assert stopped.value.code == 0
    assert "1 of 24 examples are longer" in capsys.readouterr().err.replace("\n", " ")


def test_images_of_any_mode_become_rgb(folder, capsys):
    from PIL import Image

    rng = np.random.default_rng(0)
    for number, mode in enumerate(["L", "RGBA", "P", "CMYK", "I;16", "RGB"] * 2):
        label = folder / "images" / "train" / str(number % 2)
        label.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)
        image = (
            Image.fromarray(pixels[..., 0].astype(np.uint16) * 200)
            if mode == "I;16"
            else Image.fromarray(pixels).convert(mode)
        )
        image.save(label / f"{number}.{'tiff' if mode == 'CMYK' else 'png'}")
    overrides = [
        "task={name: image-classification}",
        "backbone.model=tiny:vit",
        "lora.target_modules=[q_proj]",
        "data.path=images",
    ]
    with pytest.raises(SystemExit) as stopped:
        main(["run", "mine.yaml", *overrides, "data.partition={scheme: iid, clients: 2}"])
    assert stopped.value.code == 0, capsys.readouterr().err


def test_a_damaged_image_ends_with_its_row_and_file(folder, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 20, 20, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        path = folder / "pictures" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    path.write_bytes(path.read_bytes()[:700])
    message = fails(
        capsys,
        "mine.yaml",
        "task={name: image-classification}",
        "backbone.model=tiny:vit",
        "lora.target_modules=all-linear",
        "data={path: pictures, partition: {scheme: iid, clients: 2}}",
    )
    assert "5.png" in message
    assert "cannot be decoded" in message
    assert message.count("\n") <= 2
