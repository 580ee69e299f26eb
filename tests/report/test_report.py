"""The report of a run: self-contained, equal to the run's files, well-formed for any names."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from fedmerge_peft import RunError, federate, load_run
from fedmerge_peft.cli import main
from fedmerge_peft.report.advice import advice
from fedmerge_peft.report.figures import figures, similar_order, similarity
from fedmerge_peft.report.page import render, write_report
from fedmerge_peft.util import checked

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


def test_the_page_loads_nothing_and_has_no_scripts(run):
    page = Page(render([run]))
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not [
        value
        for name, value in page.attributes
        if name in ("src", "href", "style") and value and not value.startswith("#")
    ]
    assert "url(" not in render([run])
    assert "@import" not in render([run])


def test_a_finished_run_has_all_its_figures(run):
    titles = [figure.title for figure in figures(run)]
    for word in (
        "Test accuracy",
        "Merging weights π of each client",
        "π over the rounds",
        "Label distribution",
        "Similarity",
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
    after = page.text.split("Clients with the worst scores")[1]
    first = min(run.clients.index, key=after.index)
    assert run.clients.loc[first, "test_accuracy"] == worst == scores["worst_client_score"]
    assert f"{scores['mean']:.3f}" in page.text


def test_names_from_data_are_escaped(run, tmp_path):
    names = ["<script>alert(1)</script>", 'a"b', "c&d <b>", "x" * 300]
    text = render([rename(run, tmp_path, names)])
    page = Page(text)
    assert "script" not in page.tags
    assert all(name in page.text for name in names)


def test_several_runs_share_a_page_with_a_section_each(run):
    page = Page(render([run, run.baselines["fedavg"]]))
    assert page.tags.count("section") == 2
    assert [value for name, value in page.attributes if name == "href"] == ["#run-1", "#run-2"]
    first = page.text.index(f"{run.summary['final']['served']['mean']:.3f}")
    assert first < page.text.index("rounds done")


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
        assert width == "440"
        assert int(height) < 1000
        assert all(
            -1 <= float(x) <= 440 for x in re.findall(r'\b(?:x|x1|x2|cx)="(-?[\d.]+)"', inner)
        )
        assert all(
            0 <= float(x) <= 440 and 0 <= float(y) <= 1000
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
    assert all(each.finding and each.action for each in found)
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
    assert found[0].startswith("local has the better mean score: 0.633 against 0.500")
    assert (
        found[1] == "2 of 3 clients score lower than with local training alone: client 1, client 2"
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
        (["training.learning_rate=auto"], chosen("the middle of 5"), "no learning rate reduced"),
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
