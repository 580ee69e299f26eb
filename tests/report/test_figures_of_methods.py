"""Figures of several methods and clients: their order, colors, widths and intervals."""

import json
import math
import re
from itertools import groupby, permutations

import numpy as np
import pytest

from fedmerge_peft import load_run, register_metric
from fedmerge_peft.analysis.intervals import score_intervals
from fedmerge_peft.plotting.palette import method_styles
from fedmerge_peft.plotting.specs import Bars, Dumbbell, Lines, Spread
from fedmerge_peft.report.figures import figures
from fedmerge_peft.report.page import render
from fedmerge_peft.testing import isolated_registries
from fedmerge_peft.util import checked
from report.made_runs import NAMES, family
from report.parsed_page import Page


def test_several_runs_of_one_setting_share_their_charts(tmp_path):
    one = family(tmp_path / "one", NAMES)
    two = family(tmp_path / "two", NAMES, adapters=3)
    page = Page(render([one, two]))
    assert page.tags.count("section") == 1
    assert page.text.count("Test accuracy of each client") == 1
    assert page.text.count("Merging weights π of each client") == 2
    for name in ("fedmerge adapters=4", "fedmerge adapters=3", "fedavg", "local"):
        assert f"\n{name}\n" in page.text
    assert str(tmp_path) not in page.text.split("Run settings")[0]


def test_runs_of_other_data_have_a_section_of_their_own(tmp_path):
    texts = family(tmp_path / "texts", NAMES, perplexity=True)
    page = Page(render([family(tmp_path / "labels", NAMES), texts]))
    assert page.tags.count("section") == 2
    assert page.text.count("Test perplexity of each client") == 1


def test_repeated_runs_are_distinguished_by_their_seeds_and_folders(tmp_path):
    runs = [family(tmp_path / name, NAMES, seed=seed) for name, seed in [("a", 0), ("b", 1)]]
    text = Page(render(runs)).text
    assert "fedmerge, seed 0" in text
    assert "fedmerge, seed 1" in text
    again = family(tmp_path / "c", NAMES)
    text = Page(render([runs[0], again])).text
    assert "fedmerge, seed 0 (a)" in text
    assert "fedmerge, seed 0 (c)" in text


@pytest.mark.parametrize("perplexity", [False, True])
def test_clients_are_in_the_order_of_their_gain_over_local(tmp_path, perplexity):
    made = family(tmp_path / "run", NAMES, perplexity=perplexity)
    (chart,) = [each.drawing for each in figures(made) if each.name == "gains"]
    assert [method.name for method in chart.methods] == ["fedmerge", "local", "fedavg"]
    sign = -1 if perplexity else 1
    own, local = (np.array(method.values) for method in chart.methods[:2])
    assert (np.diff(sign * (own - local)) <= 0).all()
    by_name = made.clients[f"test_{'perplexity' if perplexity else 'accuracy'}"]
    assert list(own) == [by_name[name] for name in chart.names]
    assert (chart.intervals is None) == perplexity


def test_intervals_are_those_of_wilson(tmp_path):
    made = family(tmp_path / "run", NAMES, tests=20)
    found = score_intervals(made, made.summary["final"]["served"])
    for name, right in (made.clients["test_accuracy"] * 20).items():
        z, n = 1.959964, 20
        middle = (right + z**2 / 2) / (n + z**2)
        half = z * math.sqrt(right * (n - right) / n + z**2 / 4) / (n + z**2)
        assert found[name] == pytest.approx((middle - half, middle + half), abs=1e-5)


@pytest.mark.parametrize(
    ("facts", "has_interval"), [({"per_example": True}, True), ({"range": (0, 1)}, False)]
)
def test_a_metric_says_whether_it_is_a_fraction_of_examples(tmp_path, facts, has_interval):
    made = family(tmp_path / "run", NAMES, tests=20)
    scores = json.loads(json.dumps(made.summary["final"]["served"]).replace("accuracy", "right"))
    with isolated_registries():
        register_metric("right", **facts)(lambda predicted, expected: 0.0)
        assert (score_intervals(made, scores) is not None) == has_interval


def test_rows_of_weights_are_grouped_and_groups_named(tmp_path):
    groups = ["north", "south", "east"] * 4
    made = family(tmp_path / "run", NAMES, groups=groups)
    (chart,) = [each for each in figures(made) if each.name == "weights"]
    assert [name for name, _ in groupby(chart.drawing.groups)] in map(
        list, permutations(["north", "south", "east"])
    )
    known = dict(zip(NAMES, groups, strict=True))
    assert [known[name] for name in chart.drawing.rows] == list(chart.drawing.groups)
    for group in set(groups):
        assert f">{group}</text>" in chart.markup


def test_a_method_has_one_color_in_all_figures(tmp_path):
    made = family(tmp_path / "run", NAMES)
    styles = {"fedmerge": 0, "fedavg": 1, "local": 2}
    assert method_styles({"ditto": "ditto", "local": "local", "b": "fedmerge"}) == {
        "b": 0,
        "local": 2,
        "ditto": 3,
    }
    for figure in figures(made):
        match figure.drawing:
            case Lines(series=series):
                named = [(line.name.partition(",")[0], line.style) for line in series]
            case Spread(methods=methods) | Dumbbell(methods=methods):
                named = [(method.name, method.style) for method in methods]
            case Bars(names=names, styles=found):
                named = list(zip(names, found, strict=True))
            case _:
                named = []
        assert all(styles.get(name, style) == style for name, style in named), figure.name


def test_losses_are_compared_with_chance(tmp_path):
    (chart,) = [
        each.drawing for each in figures(family(tmp_path / "a", NAMES)) if each.name == "loss"
    ]
    lines = {line.name: line for line in chart.series}
    assert set(lines["guessing"].y) == {math.log(4)}
    assert {"fedmerge, validation", "fedmerge, training", "local, validation"} < set(lines)
    texts = family(tmp_path / "b", NAMES, perplexity=True)
    (chart,) = [each.drawing for each in figures(texts) if each.name == "loss"]
    assert "before training" in [line.name for line in chart.series]


@pytest.mark.parametrize(("count", "perplexity"), [(12, False), (50, True), (200, False)])
def test_figures_of_any_number_of_clients_stay_within_their_width(tmp_path, count, perplexity):
    names = [f"hospital, ward {number}" for number in range(count)]
    made = family(tmp_path / "run", names, groups=["a", "b"] * (count // 2), perplexity=perplexity)
    text = render([made])
    Page(text)
    sizes = re.findall(r'<svg viewBox="0 0 (\d+) (\d+)"[^>]*>(.*?)</svg>', text, re.DOTALL)
    assert len(sizes) > 10
    for width, height, inner in sizes:
        assert int(height) < 1300
        assert all(
            0 <= float(x) <= int(width) for x in re.findall(r'\b(?:x1|x2|cx)="(-?[\d.]+)"', inner)
        )
    assert text.count('data-name="client"') == min(count, 1000)


def test_infinite_perplexities_are_shown(tmp_path):
    made = family(tmp_path / "run", NAMES, perplexity=True)
    summary = made.summary
    for scores in summary["final"]["served"]["clients"].values():
        scores["test_perplexity"] = math.inf
    checked.write_document(made.path / "summary.json", summary)
    page = Page(render([made.path]))
    assert page.text.count("∞") >= len(NAMES)


def test_means_are_over_the_clients_that_have_a_score(tmp_path):
    made = family(tmp_path / "run", NAMES)
    summary = made.summary
    for state in ("final", "last"):
        del summary[state]["served"]["clients"][NAMES[0]]["test_accuracy"]
    checked.write_document(made.path / "summary.json", summary)
    (chart,) = [each for each in figures(load_run(made.path)) if each.name == "clients"]
    known = [
        each["test_accuracy"]
        for each in summary["final"]["served"]["clients"].values()
        if "test_accuracy" in each
    ]
    assert chart.drawing.methods[0].mean == pytest.approx(sum(known) / len(known))
    assert chart.markup.count('class="mean') == 3
