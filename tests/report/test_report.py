"""The report of a run: self-contained, equal to the run's files, well-formed for any names."""

import json
import math
import re
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from itertools import groupby, permutations

import numpy as np
import pytest

from fedmerge_peft import RunError, federate, load_run
from fedmerge_peft.analysis.intervals import score_intervals
from fedmerge_peft.cli import main
from fedmerge_peft.plotting.palette import method_styles
from fedmerge_peft.plotting.specs import Bars, Dumbbell, Lines, Spread
from fedmerge_peft.report.advice import advice
from fedmerge_peft.report.figures import figures
from fedmerge_peft.report.page import render, write_report
from fedmerge_peft.report.sharing_figures import similar_order, similarity
from fedmerge_peft.util import checked
from report.made_runs import family

NAMES = [f"{place} clinic" for place in "abcdefghijkl"]
VOID = {"meta", "br", "hr", "img", "link", "input"}


@pytest.fixture(scope="module")
def run(smoke, smoke_engine, tmp_path_factory):
    recipe = smoke("strategy.adapters=3", "rounds=3", "baselines=[fedavg, local]")
    return federate(recipe, tmp_path_factory.mktemp("runs") / "first", engine=smoke_engine)


class Page(HTMLParser):
    """Check that elements nest; collect text and attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.attributes, self.tags = [], "", [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def rename(run, tmp_path, names):
    """A copy of a run with other names for its first clients."""
    import shutil

    shutil.copytree(run.path, tmp_path / "renamed")
    old = run.client_names

    def renamed(document):
        text = json.dumps(document)
        for before, after in zip(old, names, strict=False):
            text = text.replace(json.dumps(before), json.dumps(after))
        return json.loads(text)

    for path in (tmp_path / "renamed").rglob("*.json"):
        checked.write_document(path, renamed(checked.read_document(path)))
    for path in (tmp_path / "renamed").rglob("*.jsonl"):
        records, digest = checked.read_records(path).records, ""
        path.unlink()
        for record in records:
            _, digest = checked.append_record(path, renamed(record), digest)
    return load_run(tmp_path / "renamed")


def test_the_page_loads_nothing_and_its_policy_admits_only_the_script_that_sorts(run):
    text = render([run])
    page = Page(text)
    assert page.tags.count("script") == 1
    (script,) = re.findall("<script>(.*?)</script>", text, re.DOTALL)
    digest = b64encode(sha256(script.encode()).digest()).decode()
    (policy,) = [value for _, value in page.attributes if value and "default-src" in value]
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy
    assert not {"link", "img", "iframe", "object"} & set(page.tags)
    assert not [
        value
        for name, value in page.attributes
        if name in ("src", "href", "style") and value and not value.startswith("#")
    ]
    assert "url(" not in text
    assert "@import" not in text


def test_a_finished_run_has_all_its_figures(run):
    titles = [figure.title for figure in figures(run)]
    for word in (
        "Test accuracy of each client",
        "Test accuracy of all clients, by method",
        "Merging weights π of each client",
        "π over the rounds",
        "Label distribution",
        "Similarity of clients by merging weights",
        "Similarity of clients by labels",
        "Loss by round",
        "Mass",
        "Entropy",
        "Local-global gap",
        "Traffic",
        "Time",
    ):
        assert [title for title in titles if word in title], word


def test_figures_have_text_alternatives(run):
    for figure in figures(run):
        assert re.search(r'role="img" aria-label="[^"]{10,}"', figure.markup)


def test_the_worst_client_comes_first_with_its_numbers(run):
    page = Page(render([run]))
    scores = run.summary["final"]["served"]
    worst = min(run.clients["test_accuracy"])
    after = page.text.split("weight\n")[1]
    first = min(run.clients.index, key=after.index)
    assert run.clients.loc[first, "test_accuracy"] == worst == scores["worst_client_score"]
    assert f"{scores['mean']:.3f}" in page.text


def test_names_from_data_are_escaped(run, tmp_path):
    names = ["<script>alert(1)</script>", 'a"b', "c&d <b>", "x" * 300]
    text = render([rename(run, tmp_path, names)])
    page = Page(text)
    assert page.tags.count("script") == 1
    assert all(name in page.text for name in names)


QUESTIONS = (
    "Is it better for each client?",
    "Who shares with whom?",
    "Did it learn?",
    "What did it cost?",
    "What to do next?",
)


def test_the_page_answers_five_questions_in_this_order(run):
    text = Page(render([run])).text
    places = [text.rindex(f"\n{question}") for question in QUESTIONS]
    assert places == sorted(places)
    own, local = (
        each.summary["final"]["served"]["clients"] for each in (run, run.baselines["local"])
    )
    better = sum(own[name]["test_accuracy"] > local[name]["test_accuracy"] for name in own)
    assert f"fedmerge is better than local for {better} of {len(own)} clients" in text


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


def test_repeated_runs_are_told_apart_by_their_seeds_and_folders(tmp_path):
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


@pytest.mark.parametrize("strategy", ["local", "fedem", "flora", "fedavg"])
def test_other_methods_have_a_page_too(strategy, smoke, smoke_engine, tmp_path):
    made = federate(
        smoke(f"strategy={strategy}", "rounds=1"), tmp_path / "run", engine=smoke_engine
    )
    assert strategy in Page(render([made])).text


def test_a_run_without_a_round_shows_the_command_that_resumes_it(run, tmp_path):
    for name in ("recipe.yaml", "clients.json", "task.json", "adapter_config.json"):
        (tmp_path / name).write_bytes((run.path / name).read_bytes())
    page = Page(render([tmp_path]))
    assert "the run has not ended: 0 of 3 rounds are done" in page.text
    assert f"fedmerge resume {tmp_path}" in page.text


def test_two_hundred_clients_and_many_labels_keep_the_pages_width(run, tmp_path):
    """Every coordinate lies within the figure, and no figure exceeds its width."""
    import torch

    big = rename(run, tmp_path, [])
    names = [f"the hospital on the hill, number {number}" for number in range(200)]
    clients = [
        {"name": name, "group": None, "train": 9, "validation": 1, "test": 4} for name in names
    ]
    checked.write_document(big.path / "clients.json", {"clients": clients})
    labels = {
        "labels": [f"label {number}" for number in range(150)],
        "counts": np.eye(200, 150, dtype=int).tolist(),
    }
    checked.write_document(big.path / "labels.json", labels)
    for path in [big.path / "weights.safetensors", *(big.path / "weights").iterdir()]:
        checked.write_tensors(path, {"weights": torch.softmax(3 * torch.randn(200, 50), dim=1)})
    text = render([big.path])
    Page(text)
    for width, height, inner in re.findall(
        r'<svg viewBox="0 0 (\d+) (\d+)"[^>]*>(.*?)</svg>', text, re.DOTALL
    ):
        assert width == "400"
        assert int(height) < 1000
        assert all(
            -1 <= float(x) <= 400 for x in re.findall(r'\b(?:x|x1|x2|cx)="(-?[\d.]+)"', inner)
        )
        assert all(
            0 <= float(x) <= 400 and 0 <= float(y) <= 1000
            for x, y in re.findall(r"M([\d.]+) ([\d.]+)", inner)
        )
    assert len(text) < 2_000_000


def test_similarity_of_clients_follows_from_common_updates():
    found = similarity(np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]))
    assert found.tolist() == [[1, 0.5, 0], [0.5, 1, 0.5], [0, 0.5, 1]]


def test_clients_with_similar_weights_are_adjacent():
    weights = np.array(
        [[0.1, 0.9, 0.0], [0.8, 0.0, 0.2], [0.0, 0.95, 0.05], [0.7, 0.3, 0.0], [0.2, 0.8, 0.0]]
    )
    assert similar_order(weights).tolist() == [3, 1, 0, 4, 2]


def test_warnings_come_with_advice(run):
    found = advice(run)
    assert found
    assert all(each.finding and each.cause and each.action for each in found)
    assert any("fewer than 30 test examples" in each.finding for each in found)


def test_clients_that_local_training_would_serve_better_are_named(write_run, tmp_path):
    path = write_run("mine", ["baselines=[local]"], [[0.1, 0.1, 0.1], [0.6, 0.4, 0.5]])
    local = write_run("other", ["strategy=local"], [[0.1, 0.1, 0.1], [0.5, 0.7, 0.7]])
    (path / "baselines").mkdir()
    local.rename(path / "baselines" / "local")
    clients = [
        {"name": f"client {number}", "group": None, "train": 9, "validation": 1, "test": 40}
        for number in range(3)
    ]
    checked.write_document(path / "clients.json", {"clients": clients})
    from fedmerge_peft.report.advice import _worse_than_baselines

    found = [each.finding for each in _worse_than_baselines(load_run(path))]
    assert found[0].startswith("local has the better mean test accuracy: 0.633 against 0.500")
    assert found[1] == (
        "2 of 3 clients have a worse test accuracy than with local training alone (2 of them by "
        "more than the 95 % interval): client 1, client 2"
    )


@pytest.fixture
def advised(write_run, write_records):
    """``advised(overrides, ...)``: findings and actions on a run of a round for each loss."""

    def find(overrides=(), losses=(1.0, 1.0), groups=("",) * 4, labels="abcd", **files):
        scores = [[0.5] * len(groups)] * (len(losses) + 1)
        path = write_run("run", ["baselines=[]", *overrides], scores)
        records = [
            {**record, "train_loss": loss, "warnings": files.get("warnings", [])}
            for record, loss in zip(load_run(path).records, losses, strict=True)
        ]
        write_records(path / "metrics.jsonl", records)
        checked.write_document(path / "task.json", {"labels": list(labels), "format": None})
        clients = [
            {"name": f"client {number}", "group": group, "train": 9, "validation": 1, "test": 40}
            for number, group in enumerate(groups)
        ]
        checked.write_document(path / "clients.json", {"clients": clients})
        if decisions := files.get("decisions"):
            checked.write_document(path / "decisions.json", decisions)
        return {each.finding: each.action for each in advice(load_run(path))}

    return find


def chosen(reason):
    return {"learning_rate": {"value": 0.003, "reason": reason}}


@pytest.mark.parametrize(
    ("overrides", "decisions", "action"),
    [
        ([], None, "leave training.learning_rate at auto"),
        (["training.learning_rate=auto"], chosen("chosen from 5 rates"), "use more rounds"),
        (["training.learning_rate=auto"], chosen("the middle of 5"), "check that labels"),
    ],
)
def test_a_training_loss_near_that_of_guessing_is_found(advised, overrides, decisions, action):
    found = advised(overrides, losses=(1.4, 1.3), decisions=decisions)
    finding = "the training loss of the last round is 1.30, near that of guessing one of 4 labels"
    (advice_on_it,) = [found[each] for each in found if each.startswith(finding)]
    assert advice_on_it.startswith(action)


def test_a_training_loss_below_that_of_guessing_is_no_finding(advised):
    assert not [finding for finding in advised(losses=(1.4, 1.2)) if "guessing" in finding]


@pytest.mark.parametrize(
    ("losses", "found"), [((2.0, 1.99), True), ((2.0, 1.5), False), ((0.01, 0.01), False)]
)
def test_a_flat_training_loss_is_found_without_labels(advised, losses, found):
    findings = advised(losses=losses, labels="")
    assert any(each.startswith("the training loss is flat") for each in findings) == found


def test_advice_on_perplexities_takes_lower_ones_for_better(tmp_path):
    made = family(tmp_path / "run", NAMES, perplexity=True)
    found = [f"{each.finding}: {each.cause}; {each.action}" for each in advice(made)]
    local = made.baselines["local"].clients["test_perplexity"]
    worse = (made.clients["test_perplexity"] > local).sum()
    assert f"{worse} of {len(NAMES)} clients have a worse test perplexity" in "\n".join(found)
    for words in ("correct answer", "score lower", "interval", "accuracy"):
        assert words not in "\n".join(found)


def test_finetuning_that_lowers_the_perplexity_is_found(tmp_path):
    made = family(tmp_path / "run", NAMES, perplexity=True, rounds=2)
    (found,) = [each for each in advice(made) if "round of local training" in each.finding]
    assert "still lowers the test perplexity" in found.finding


def test_overfitting_names_its_cause(tmp_path):
    made = family(tmp_path / "run", NAMES)
    (made.path / "best").mkdir()
    best = {"after_round": 3, "served": made.summary["final"]["served"]}
    checked.write_document(made.path / "best" / "scores.json", best)
    (found,) = [each for each in advice(load_run(made.path)) if "lowest" in each.finding]
    assert found.cause.startswith("overfitting: the training loss went on falling")


@pytest.mark.parametrize(
    ("strategy", "found"),
    [
        ("{name: fedmerge, start: warm, warm_rounds: 2}", True),
        ("{name: fedmerge, start: warm, warm_rounds: 1}", False),
        ("{name: fedmerge, start: independent, warm_rounds: 2}", False),
        ("{name: flhc, warm_rounds: 2}", True),
        ("fedavg", False),
    ],
)
def test_a_run_that_ends_with_its_warm_rounds_is_found(advised, strategy, found):
    warnings = ["until clients are grouped after round 2, all equals FedAvg"]
    findings = advised([f"strategy={strategy}"], warnings=warnings)
    assert any("all 2 rounds are warm rounds" in each for each in findings) == found
    assert any("until clients are grouped" in each for each in findings) != found


@pytest.mark.parametrize(
    ("adapters", "groups", "found"),
    [(2, "aabbcc", True), (3, "aabbcc", False), (2, "aabbcd", False), (2, "abcdef", False)],
)
def test_fewer_adapters_than_known_groups_are_found(advised, adapters, groups, found):
    strategy = f"strategy={{name: ifca, adapters: {adapters}}}"
    findings = advised([strategy], groups=groups)
    assert ("3 known groups of clients share 2 adapters" in findings) == found


def test_the_page_shows_learning_rate_and_epochs(run, tmp_path):
    assert "learning rate" in Page(render([run])).text
    from shutil import copytree

    copytree(run.path, tmp_path / "run")
    recipe = run.recipe.replace(["training.learning_rate=auto"])
    checked.write_text(tmp_path / "run" / "recipe.yaml", recipe.to_yaml())
    checked.write_document(tmp_path / "run" / "decisions.json", chosen("chosen from 5 rates"))
    assert "0.003, chosen from 5 rates" in Page(render([tmp_path / "run"])).text


def test_the_command_writes_the_page(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(run.path), "--out", str(tmp_path / "page.html")])
    assert not stopped.value.code
    assert capsys.readouterr().out == f"wrote {tmp_path / 'page.html'}\n"
    Page((tmp_path / "page.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("runs", "out", "message"),
    [
        (["nowhere"], "page.html", "nowhere holds no run"),
        (["RUN", "nowhere"], "page.html", "nowhere holds no run"),
        (["RUN"], "page.pdf", "page.pdf: a report is an HTML page"),
        (["RUN"], "no/such/page.html", "does not exist"),
        ([], "page.html", "Missing argument"),
    ],
)
def test_bad_input_is_one_message(runs, out, message, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["report", *(each.replace("RUN", str(run.path)) for each in runs), "--out", out])
    err = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in err
    assert "Traceback" not in err


def test_a_report_without_runs_is_refused(tmp_path):
    with pytest.raises(RunError, match="no run to report on"):
        write_report([], tmp_path / "page.html")


def test_control_and_direction_characters_of_names_are_escaped(run, tmp_path):
    names = ["north\u202eclinic", "bell\x07 and escape\x1b[31m", "line\nfeed", "<b>bold</b>"]
    text = render([rename(run, tmp_path, names)])
    for character in "\u202e\x07\x1b":
        assert character not in text
    assert "north\\u202eclinic" in text
    assert "<b>bold" not in text
