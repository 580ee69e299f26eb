"""The comparison: searches, ledgers that resume, and pages that follow from the ledgers alone."""

import json
from pathlib import Path

import pytest
import yaml

from fedmerge_peft import Recipe
from fedmerge_peft.plugins import STRATEGIES
from fedmerge_peft.runs.directory import RunDirectory

QUALITY = Path(__file__).parents[2] / "benchmarks" / "quality"


@pytest.fixture(autouse=True)
def programs(monkeypatch):
    """The interpreter finds programs in their own folder."""
    monkeypatch.syspath_prepend(str(QUALITY))


# ---- the search ----------------------------------------------------------------------------------


def searched(axes, score):
    """Run a search to its end; return its result and the candidates in the order of their runs."""
    from search import search

    known = {}
    while (state := search(axes, known.get)).waiting:
        assert len(state.waiting) <= state.planned
        known |= {candidate: score(candidate) for candidate in state.waiting}
    assert state.planned == 0
    return state.best, list(known)


def ladder(key="rate", first=(3, 2, 4), values=(0, 1, 2, 3, 4, 5, 6)):
    from search import Axis

    return Axis(key, tuple(values), tuple(first))


def test_a_winner_inside_ends_the_search():
    assert searched([ladder()], lambda candidate: -abs(candidate[0] - 3)) == (
        (3,),
        [(3,), (2,), (4,)],
    )


@pytest.mark.parametrize(
    ("peak", "tried"), [(0, [3, 2, 4, 1, 0]), (1, [3, 2, 4, 1, 0]), (5, [3, 2, 4, 5, 6])]
)
def test_an_edge_that_wins_is_extended_until_the_ladder_ends(peak, tried):
    best, order = searched([ladder()], lambda candidate: -abs(candidate[0] - peak))
    assert best == (peak,)
    assert order == [(value,) for value in tried]


def test_the_second_axis_is_searched_at_the_best_of_the_first():
    axes = [ladder(), ladder("clusters", first=("few", "many"), values=("one", "few", "many"))]
    best, order = searched(axes, lambda c: -abs(c[0] - 2) + {"one": 0, "few": 1, "many": 2}[c[1]])
    assert best == (2, "many")
    assert order == [(3, "few"), (2, "few"), (4, "few"), (1, "few"), (2, "many")]


def test_of_equal_scores_the_default_wins():
    assert searched([ladder()], lambda _: 0.5)[0] == (3,)


def test_an_end_of_a_ladder_is_one_unless_nothing_lies_below():
    from search import Axis

    assert [value for value in (0, 0.5, 0.9) if Axis("", (0, 0.5, 0.9), ()).at_end(value)] == [0.9]
    assert Axis("", (0.01, 0.1, 1), ()).at_end(0.01)


def test_without_axes_there_is_one_candidate():
    assert searched([], None) == ((), [])


# ---- the ledger ----------------------------------------------------------------------------------


def values(*overrides, **inputs):
    from ledger import effective

    return effective(Recipe.load("smoke", ["baselines=[]", *overrides]), inputs)


def test_a_digest_changes_with_what_decides_the_result_only():
    from ledger import digest

    base = digest(values(data="a"))
    for override in ("training.device=cpu", "name=other", "data.path=elsewhere.csv",
                     "training.clients_per_batch=2", "evaluation.batch_size=2"):  # fmt: skip
        assert digest(values(override, data="a")) == base, override
    for override in ("seed=7", "rounds=99", "strategy=fedavg", "training.learning_rate=0.25"):
        assert digest(values(override, data="a")) != base, override
    assert digest(values(data="b")) != base
    assert digest(values(data="a", revision=1)) != base
    assert digest(values("strategy=fedavg")) == digest(
        values("strategy={name: fedavg, server_momentum: 0}")
    )


def test_a_run_is_found_again_after_a_new_key_was_added(tmp_path):
    from ledger import Ledger, digest

    ledger, old = Ledger(tmp_path / "a.jsonl"), values()
    ledger.append({"digest": digest(old), "recipe": old})
    assert ledger.find({**old, "training.new_key": 1}) is not None
    assert ledger.find({**old, "rounds": 99}) is None


def test_a_half_written_line_is_left_out_and_replaced(tmp_path):
    from ledger import Ledger

    path = tmp_path / "a.jsonl"
    ledger = Ledger(path)
    ledger.append({"digest": "a", "recipe": {"seed": 0}})
    with path.open("a") as file:
        file.write('{"digest": "b", "rec')
    other = Ledger(path)
    assert [line["digest"] for line in other.lines] == ["a"]
    other.append({"digest": "c", "recipe": {"seed": 1}})
    ledger.read()
    assert [line["digest"] for line in ledger.lines] == ["a", "c"]
    assert [json.loads(line)["digest"] for line in path.read_text().splitlines()] == ["a", "c"]


# ---- settings ------------------------------------------------------------------------------------


def test_all_methods_are_compared_in_at_least_one_setting():
    from comparison import settings

    found = settings([])
    assert len(found) == 11
    compared = {method.strategy for setting in found for method in setting.methods.values()}
    assert compared == {
        entry.name for entry in STRATEGIES if entry.module.startswith("fedmerge_peft.")
    }


def test_rivals_have_four_candidates_and_fedmerge_one_configuration():
    from comparison import settings

    for setting in settings([]):
        assert setting.reference == "fedmerge"
        assert setting.methods["fedmerge"].settings(()) == ["training.learning_rate=auto"]
        for method in setting.methods.values():
            if method.name != "fedmerge":
                assert sum(len(axis.first) - 1 for axis in method.axes) >= 3
                assert method.axes[0].key == "training.learning_rate"
            for axis in method.axes:
                places = sorted(map(axis.values.index, axis.first))
                assert places == list(range(places[0], places[-1] + 1)), "neighbors on the ladder"


@pytest.mark.parametrize(("name", "seeds"), [("assistants", 5), ("chats", 3)])
def test_chats_compare_four_methods_with_fedmerge(name, seeds):
    from comparison import settings

    (setting,) = settings([name])
    assert set(setting.methods) == {"fedmerge", "fedavg", "local", "flhc", "ifca"}
    for method in setting.methods.values():
        assert len(method.seeds) == seeds
        choice = tuple(axis.first[0] for axis in method.axes)
        recipe = setting.recipe(method, choice, setting.tuning_seed)
        assert recipe.strategy.name == method.strategy
        assert recipe.lora.layers_to_transform == list(range(20, 30))
        assert method.strategy != "fedmerge" or recipe.strategy.warm_rounds == 3


def test_an_unknown_setting_is_one_message():
    from comparison import settings

    with pytest.raises(SystemExit, match=r"^no setting nosuch; there are assistants, "):
        settings(["nosuch"])


# ---- from the first run to the pages -------------------------------------------------------------


@pytest.fixture
def quality(tmp_path, monkeypatch, capsys):
    """``quality("run", "--hours", "1")`` on a small setting: its output and its ledger."""
    import comparison

    import quality as program

    common = {
        "settings": ["mine"],
        "overrides": ["baselines=[]", "evaluation.every=1000", "evaluation.finetuned=false"],
        "tuning_seed": 100,
        "seeds": {"core": [0]},
        "axes": {
            "rate": {
                "key": "training.learning_rate",
                "first": [0.005, 0.05],
                "values": [0.005, 0.05],
            }
        },
        "core": {
            "fedmerge": {"overrides": ["strategy.warm_rounds=1"]},
            "local": {"axes": ["rate"]},
        },
    }
    small = ["data.max_train=8", "data.max_test=6", "data.filter.provider=[Alder, Birch]"]
    own = {"recipe": "smoke", "overrides": ["rounds=2", "data.validation_fraction=0.3", *small]}
    for name, text in (("comparison", common), ("mine", own)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(text))
    monkeypatch.setattr(comparison, "HERE", tmp_path)
    folders = [f"--{name}={tmp_path / name}" for name in ("ledgers", "runs", "pages")]

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["quality.py", *arguments, *folders])
        program.main()
        path = tmp_path / "ledgers" / "mine.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return capsys.readouterr().out, [json.loads(line) for line in lines]

    return run


def interrupted(recipe, path, engine, callbacks):
    """Run one round, then end as if the user had pressed Ctrl-C."""
    from fedmerge_peft import Callback
    from fedmerge_peft.federation.sweep import run_or_resume

    def stop(record):
        raise KeyboardInterrupt

    run_or_resume(recipe, path, engine, [*callbacks, Callback(on_round=stop)])


def test_a_comparison_resumes_and_is_written_from_its_ledger(quality, tmp_path, monkeypatch):
    import quality as program

    assert "mine: at least 4 runs left, of unknown length" in quality("plan")[0]
    assert quality("run", "--data", "data", "--hours", "0") == ("", [])
    with monkeypatch.context() as patch:
        patch.setattr(program, "run_or_resume", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quality("run", "--data", "data")
    (unfinished,) = (tmp_path / "runs" / "mine").iterdir()
    assert len(RunDirectory(unfinished).records) == 1
    assert len(quality("run", "--data", "data", "--methods", "local")[1]) == 3

    lines = quality("run", "--data", "data")[1]
    assert [(line["method"], line["role"], line["seed"]) for line in lines] == [
        ("local", "tuning", 100),
        ("local", "tuning", 100),
        ("local", "report", 0),
        ("fedmerge", "report", 0),
    ]
    assert quality("run", "--data", "data") == ("", lines)
    assert not list((tmp_path / "runs" / "mine").iterdir())
    assert "mine: at least 0 runs left, about 0.0 hours" in quality("plan")[0]

    line = lines[-1]
    assert len(line["clients"]["test"]) == len(line["clients"]["group"]) == 6
    assert line["mean"] == pytest.approx(sum(line["clients"]["test"]) / 6, abs=1e-6)
    assert line["decisions"]

    quality("pages")
    page = (tmp_path / "pages" / "comparison_mine.md").read_text()
    assert "| fedmerge | 1 | " in page
    assert "Missing" not in page
    assert "local" in (tmp_path / "pages" / "comparison_mine.csv").read_text()
    assert "[mine](comparison_mine.md)" in (tmp_path / "pages" / "comparison.md").read_text()


def test_all_methods_have_a_seed_before_any_has_the_next(tmp_path, monkeypatch):
    from comparison import Setting
    from ledger import Ledger, digest
    from progress import jobs

    setting, ledger = Setting("quickstart"), Ledger(tmp_path / "a.jsonl")
    methods = [setting.methods[name] for name in ("fedmerge", "fedavg", "local")]
    first = list(jobs(setting, methods, ledger))
    assert [job.role for job in first] == ["tuning"] * 6 + ["report"] * 5
    assert [job.choice[0] for job in first[:6]] == [0.0015] * 2 + [0.005] * 2 + [0.015] * 2
    while (job := next(jobs(setting, methods, ledger), None)) and job.seed in (100, 0):
        ledger.append({"digest": digest(job.values), "recipe": job.values, "validation": 0.5})
    waiting = [(job.method.name, job.seed) for job in jobs(setting, methods, ledger)]
    names = [method.name for method in methods]
    assert waiting == [(name, seed) for seed in (1, 2, 3, 4) for name in names]


# ---- pages ---------------------------------------------------------------------------------------


def test_the_paired_interval_has_known_values():
    from tables import paired_interval

    mean, low, high = paired_interval([0.01, 0.02, 0.03])
    # t(0.975, 2) = 4.302653, standard error 0.01 / sqrt(3)
    assert (mean, low, high) == pytest.approx((0.02, 0.02 - 0.0248414, 0.02 + 0.0248414), abs=1e-6)
    assert paired_interval([0.01]) is None


def line(mean, **more):
    shared = {"worst_tenth": mean, "bytes_down": 0, "bytes_up": 0, "seconds": 1.0}
    return {"mean": mean, **shared, **more}


def made(name, scores, **more):
    from comparison import Method
    from progress import Progress
    from search import Search

    lines = {seed: line(mean) for seed, mean in scores.items()}
    method = Method(name, name, seeds=tuple(range(3)))
    return Progress(method, Search((), [], 0), {}, {**lines, **more.get("failed", {})})


def test_rows_are_paired_by_seed_and_sorted():
    from tables import rows_of, verdict

    found = [
        made("fedmerge", {0: 0.8, 1: 0.6}),
        made("local", {0: 0.7, 1: 0.4, 2: 0.1}),
        made("fedavg", {0: 0.805, 1: 0.605}),
        made("ifca", {}, failed={0: {"error": "not finite"}}),
        made("flhc", {1: 0.5}),
    ]
    rows = rows_of(found, "fedmerge")
    assert [row["method"] for row in rows] == ["fedavg", "fedmerge", "flhc", "local"]
    by_name = {row["method"]: row for row in rows}
    assert by_name["local"]["difference"] == pytest.approx(-0.15)
    assert by_name["local"]["runs"] == 3
    assert by_name["flhc"]["difference"] is None
    assert by_name["fedmerge"]["difference"] is None
    assert verdict(rows)[1:3] == ("2", "fedavg")
    assert verdict(rows)[6] == "within a point"


@pytest.mark.parametrize(
    ("mean", "word"),
    [(0.6, "above"), (0.7, "equal"), (0.7001, "equal"), (0.705, "within a point"), (0.8, "below")],
)
def test_differences_below_the_digits_shown_are_none(mean, word):
    from tables import rows_of, verdict

    rows = rows_of([made("fedmerge", {0: 0.7}), made("flhc", {0: mean})], "fedmerge")
    assert verdict(rows)[6] == word


def test_missing_seeds_and_failures_are_named():
    from tables import _missing

    found = [made("local", {0: 0.7, 2: 0.1}), made("ifca", {}, failed={0: {"error": "x"}})]
    assert _missing(found) == {"local": "seeds 1", "ifca": "seeds 1, 2"}
    assert found[1].failed == {0: "x"}
