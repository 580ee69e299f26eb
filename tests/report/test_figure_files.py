"""Figures as files: the same as on the page, legible with many clients."""

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedmerge_peft import Run, RunError, federate
from fedmerge_peft.cli import main
from fedmerge_peft.plotting.render import draw
from fedmerge_peft.report.figures import figures
from fedmerge_peft.report.page import write_figures
from fedmerge_peft.util import checked


@pytest.fixture(scope="module")
def run(smoke, smoke_engine, tmp_path_factory):
    recipe = smoke("strategy.adapters=3", "rounds=3", "baselines=[fedavg, local]")
    return federate(recipe, tmp_path_factory.mktemp("runs") / "first", engine=smoke_engine)


def drawn(run, name):
    (found,) = [figure for figure in figures(run) if figure.name == name]
    return draw(found.drawing, found.title)


def test_each_figure_of_the_page_is_a_png_and_an_svg(run, tmp_path):
    written = write_figures([run], tmp_path / "figures")
    names = [figure.name for figure in figures(run)]
    assert len(set(names)) == len(names) == 15
    assert {path.name for path in written} == {
        f"{name}{suffix}" for name in names for suffix in (".png", ".svg")
    }
    for path in written:
        if path.suffix == ".png":
            assert len(np.unique(np.asarray(Image.open(path).convert("L")))) > 10
        else:
            assert "<svg" in path.read_text(encoding="utf-8")[:500]


def test_the_same_figure_is_the_same_file(run, tmp_path):
    first, second = (write_figures([run], tmp_path / name) for name in ("a", "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_titles_and_axes_name_quantities_and_units(run):
    scores = drawn(run, "scores")
    (axes,) = scores.axes
    assert scores.get_suptitle() == "Test accuracy, mean over clients, by round"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("rounds completed", "test accuracy")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "fedmerge",
        "finetuned",
        "fedavg",
        "local",
        "guessing",
    ]
    assert [each.get_ylabel() for each in drawn(run, "weights").axes][1] == "merging weight π"
    assert drawn(run, "time").axes[0].get_xlabel() == "wall clock of all rounds (s)"


def test_figures_show_the_runs_numbers(run):
    served = drawn(run, "scores").axes[0].lines[0]
    assert served.get_ydata()[-1] == pytest.approx(run.summary["final"]["served"]["mean"])
    shares = drawn(run, "weights").axes[0].images[0].get_array()
    assert sorted(np.asarray(shares).max(axis=1)) == pytest.approx(
        sorted(run.weights.max(axis=1)), abs=1e-6
    )
    learned, held = (
        np.asarray(drawn(run, name).axes[0].images[0].get_array())
        for name in ("similarity", "similarity-labels")
    )
    assert np.diag(learned) == pytest.approx(1)
    assert not np.allclose(learned, held)
    rounds = [
        panel.get_title() for panel in drawn(run, "weights-by-round").axes if panel.get_title()
    ]
    assert rounds == ["round 1", "round 2", "round 3"]


def test_names_of_two_hundred_clients_do_not_overlap(run, tmp_path):
    big = Run(Path(shutil.copytree(run.path, tmp_path / "big")))
    names = [f"the hospital on the $hill$, number {number}" for number in range(200)]
    clients = [
        {"name": name, "group": None, "train": 9, "validation": 1, "test": 4} for name in names
    ]
    checked.write_document(big.path / "clients.json", {"clients": clients})
    labels = [f"label {number}" for number in range(150)]
    counts = np.eye(200, 150, dtype=int).tolist()
    checked.write_document(big.path / "labels.json", {"labels": labels, "counts": counts})
    for path in [big.path / "weights.safetensors", *(big.path / "weights").iterdir()]:
        checked.write_tensors(path, {"weights": torch.softmax(3 * torch.randn(200, 50), dim=1)})
    for name in ("weights", "labels", "similarity", "weights-by-round"):
        figure = drawn(Run(big.path), name)
        figure.draw_without_rendering()
        assert max(figure.get_size_inches()) <= 11
        for axes in figure.axes:
            boxes = [
                label.get_window_extent() for label in axes.get_yticklabels() if label.get_text()
            ]
            assert all(not one.overlaps(other) for one, other in pairwise(boxes))


def test_several_runs_have_a_folder_each(run, tmp_path):
    written = write_figures([run, run.baselines["fedavg"]], tmp_path)
    shared = tmp_path.name
    assert {path.parent.name for path in written} == {shared, "1-smoke"}  # fedavg has one adapter
    assert {path.name for path in written if path.parent == tmp_path} >= {"gains.png", "time.svg"}


def test_a_run_that_is_named_twice_is_shown_once(run, tmp_path):
    once, twice = (write_figures([run] * n, tmp_path / str(n)) for n in (1, 2))
    assert [path.name for path in once] == [path.name for path in twice]


def test_the_command_writes_figures(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(
            [
                "report",
                str(run.path),
                "--out",
                str(tmp_path / "page.html"),
                "--figures",
                str(tmp_path / "figures"),
            ]
        )
    assert not stopped.value.code
    assert capsys.readouterr().out.splitlines()[1] == f"wrote 30 files to {tmp_path / 'figures'}"


def test_a_folder_that_cannot_be_created_is_one_message(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"clients\.png cannot be written"):
        write_figures([run], tmp_path / "file")


def test_the_readmes_figure_can_be_drawn_from_a_run(run):
    import importlib.util

    program = Path(__file__).parents[2] / "docs" / "images" / "weights.py"
    spec = importlib.util.spec_from_file_location("weights", program)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    heat = module.picture(run)
    groups = [row.rpartition(" · ")[2] for row in heat.rows]
    assert groups == sorted(groups)
    assert heat.values.sum(axis=1) == pytest.approx(1, abs=1e-5)
    assert draw(heat, "title").axes
