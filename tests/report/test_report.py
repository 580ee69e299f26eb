"""The report of a run: self-contained, equal to the run's files, well-formed for any names."""

import json
import re
from base64 import b64encode
from hashlib import sha256

import numpy as np
import pytest

from fedmerge_peft import RunError, federate, load_run
from fedmerge_peft.cli import main
from fedmerge_peft.report.advice import advice
from fedmerge_peft.report.figures import figures
from fedmerge_peft.report.methods import settings
from fedmerge_peft.report.page import render, write_report
from fedmerge_peft.report.sharing_figures import answer, similar_order, similarity
from fedmerge_peft.util import checked
from report.made_runs import chosen, family
from report.parsed_page import Page


@pytest.fixture(scope="module")
def run(smoke, smoke_engine, tmp_path_factory):
    recipe = smoke("strategy.adapters=3", "rounds=3", "baselines=[fedavg, local]")
    return federate(recipe, tmp_path_factory.mktemp("runs") / "first", engine=smoke_engine)


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


def test_a_single_client_and_group_are_no_plurals(tmp_path):
    places = {("a",): ["north"], ("a", "b", "c"): ["north", "south", "north"]}
    made = (
        family(tmp_path / groups[-1] / str(len(names)), names, groups=groups, rounds=2, adapters=2)
        for names, groups in places.items()
    )
    one, two = (answer(setting.methods[0]) for run in made for setting in settings([run]))
    assert "1 of 1 client has more than half of its weight on one adapter." in one
    assert "1 of 2 groups has its own main adapter: all clients of the group" in two


def test_the_page_answers_five_questions_in_this_order(run):
    text = Page(render([run])).text
    places = [text.rindex(f"\n{question}") for question in QUESTIONS]
    assert places == sorted(places)
    own, local = (
        each.summary["final"]["served"]["clients"] for each in (run, run.baselines["local"])
    )
    better = sum(own[name]["test_accuracy"] > local[name]["test_accuracy"] for name in own)
    assert f"fedmerge is better than local for {better} of {len(own)} clients" in text


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


def test_the_page_shows_learning_rate_and_epochs(run, tmp_path):
    assert "learning rate" in Page(render([run])).text
    from shutil import copytree

    copytree(run.path, tmp_path / "run")
    recipe = run.recipe.replace(["training.learning_rate=auto"])
    checked.write_text(tmp_path / "run" / "recipe.yaml", recipe.to_yaml())
    checked.write_document(tmp_path / "run" / "decisions.json", chosen("chosen from 5 rates", True))
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
