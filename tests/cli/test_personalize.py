"""``fedmerge personalize``: output and files."""

import json

import pytest

from fedmerge_peft import Recipe, federate
from fedmerge_peft.cli import main
from fedmerge_peft.data import load_splits

SMALL = [
    "rounds=1",
    "data.max_train=8",
    "data.max_test=6",
    "data.filter.provider=[Alder, Birch]",
    "strategy.adapters=3",
    "baselines=[fedavg]",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return federate(
        Recipe.load("smoke", [*SMALL, "training.device=cpu"]),
        tmp_path_factory.mktemp("runs") / "first",
    )


@pytest.fixture
def file(tmp_path):
    """Tickets of an organisation that is not a client."""
    loaded = load_splits(Recipe.load("smoke", ["data.filter={organisation: Fen Water}"]).data)[
        "train"
    ]
    loaded.select(range(12)).to_csv(tmp_path / "Fen Water.csv")
    return tmp_path / "Fen Water.csv"


@pytest.fixture
def personalize(capsys):
    """Run the command in this process; return exit code, standard output, standard error."""

    def call(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main(["personalize", *map(str, arguments)])
        return (stopped.value.code or 0, *capsys.readouterr())

    return call


def test_the_command_prints_scores_and_weights_and_saves_a_peft_folder(run, file, personalize):
    code, out, _ = personalize(run.path, "--data", file)
    assert code == 0
    assert "Fen Water: 8 training examples, 4 test examples" in out
    assert all(text in out for text in ("training loss", "test loss", "test accuracy", "seconds"))
    assert all(
        method in out
        for method in ("mean adapter", "best single adapter", "learned weights", "local training")
    )
    assert "merging weights    0: " in out
    assert "nearest client     " in out
    folder = run.path / "personalized" / "Fen Water"
    assert f"adapter folder     {folder}" in out
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "weights.json",
        "README.md",
        "SHA256SUMS",
    }
    assert json.loads((folder / "weights.json").read_text())["examples"] == {"train": 8, "test": 4}
    before = {path: path.read_bytes() for path in folder.iterdir()}
    code, out, err = personalize(run.path, "--data", file)
    assert (code, out) == (2, "")
    assert f"{folder} already holds other files; existing files are never overwritten" in err
    assert f"such as {folder}-2" in err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_options(run, file, personalize, tmp_path):
    out_folder = tmp_path / "mine"
    options = [
        "--name",
        "[red]",
        "--best",
        "--test-fraction",
        0,
        "--max-train",
        1,
        "--no-local",
        "--seed",
        1,
        "--out",
        out_folder,
    ]
    code, out, _ = personalize(run.path, "--data", file, *options)
    assert code == 0
    assert "[red]: 1 training example, 0 test examples" in out
    assert "local training" not in out
    assert "accuracy" not in out
    assert (out_folder / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN"], "Missing option '--data'"),
        (["RUN", "--data", "nowhere.csv"], "nowhere.csv does not exist"),
        (["nowhere", "--data", "FILE"], "nowhere holds no run"),
        (["RUN/baselines/fedavg", "--data", "FILE"], "one adapter for all clients (fedavg)"),
        (["RUN", "--data", "FILE", "--name", "a/b"], "'a/b' is not a valid folder name"),
        (["RUN", "--data", "FILE", "--test-fraction", "1"], "--test-fraction"),
        (["RUN", "--data", "FILE", "--max-train", "0"], "--max-train"),
    ],
)
def test_bad_input_is_one_message(run, file, personalize, arguments, message):
    code, out, err = personalize(
        *(each.replace("RUN", str(run.path)).replace("FILE", str(file)) for each in arguments)
    )
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert not (run.path / "baselines" / "fedavg" / "personalized").exists()
