"""Comparisons of several runs, with expected numbers computed by hand."""

import logging
import math

import pandas
import pytest

from fedmerge_peft import Comparison, Run, RunError, compare
from fedmerge_peft.analysis.reports import markdown

FEDMERGE, FEDAVG, LOCAL = "strategy=fedmerge", "strategy=fedavg", "strategy=local"


@pytest.fixture
def three_methods(write_run, tmp_path):
    """Two seeds of each method, two clients, two rounds.

    The means of the final scores are 0.6 and 0.8, 0.5 and 0.5, 0.6 and 0.4.
    """
    write_run("fedmerge-0", [FEDMERGE, "seed=0"], [[0.0, 0.2], [0.4, 0.6], [0.5, 0.7]])
    write_run("fedmerge-1", [FEDMERGE, "seed=1"], [[0.0, 0.2], [0.2, 0.4], [0.7, 0.9]])
    write_run("fedavg-0", [FEDAVG, "seed=0"], [[0.0, 0.2], [0.3, 0.3], [0.3, 0.7]])
    write_run("fedavg-1", [FEDAVG, "seed=1"], [[0.0, 0.2], [0.3, 0.3], [0.4, 0.6]])
    write_run("local-0", [LOCAL, "seed=0"], [[0.0, 0.2], [0.3, 0.3], [0.5, 0.7]])
    write_run("local-1", [LOCAL, "seed=1"], [[0.0, 0.2], [0.3, 0.3], [0.4, 0.4]])
    return tmp_path


def by_method(frame):
    return frame.set_index("method")


def test_scores_are_means_and_deviations_over_seeds(three_methods):
    frame = by_method(compare([three_methods]))
    assert list(frame.index) == ["fedmerge", "fedavg", "local"]  # the best first
    assert list(frame["runs"]) == [2, 2, 2]
    assert list(frame["mean"]) == pytest.approx([0.7, 0.5, 0.5])
    assert list(frame["mean_std"]) == pytest.approx([math.sqrt(0.02), 0.0, math.sqrt(0.02)])
    assert list(frame["worst_tenth"]) == pytest.approx([0.6, 0.35, 0.45])
    assert list(frame["spread"]) == pytest.approx([0.1, 0.15, 0.05])


def test_gains_are_paired_by_seed(three_methods):
    frame = by_method(compare([three_methods]))
    # over fedavg: 0.1 and 0.3; over local: 0.0 and 0.4
    assert frame.loc["fedmerge", "gain_over_fedavg"] == pytest.approx(0.2)
    assert frame.loc["fedmerge", "gain_over_fedavg_std"] == pytest.approx(math.sqrt(0.02))
    assert frame.loc["fedmerge", "gain_over_local"] == pytest.approx(0.2)
    assert frame.loc["fedmerge", "gain_over_local_std"] == pytest.approx(math.sqrt(0.08))
    assert frame.loc["local", "gain_over_fedavg"] == pytest.approx(0.0)
    assert math.isnan(frame.loc["fedavg", "gain_over_fedavg"])


def test_a_seed_without_counterpart_counts_in_the_mean_and_not_in_the_gain(
    three_methods, write_run
):
    write_run("fedmerge-2", [FEDMERGE, "seed=2"], [[0.0, 0.0], [0.0, 0.0], [0.1, 0.1]])
    frame = by_method(compare([three_methods]))
    assert frame.loc["fedmerge", "runs"] == 3
    assert frame.loc["fedmerge", "mean"] == pytest.approx(0.5)
    assert frame.loc["fedmerge", "gain_over_fedavg"] == pytest.approx(0.2)


def test_costs_are_of_one_client_and_the_whole_run(three_methods):
    frame = by_method(compare([three_methods]))
    assert list(frame.loc["fedmerge", ["bytes_down", "bytes_up", "seconds"]]) == [200.0, 80.0, 4.0]


def test_rounds_are_counted_until_the_mean_reaches_fedavgs_final_score(three_methods):
    comparison = Comparison.of([three_methods])
    assert comparison.target is None
    frame = by_method(comparison.methods)
    assert frame.loc["fedmerge", "target"] == 0.5
    # one round with seed 0, two with seed 1
    assert frame.loc["fedmerge", "rounds_to_target"] == 1.5
    assert frame.loc["fedavg", "rounds_to_target"] == 2
    assert frame.loc["local", "rounds_to_target"] == math.inf  # one seed of two is not a median


def test_a_lucky_first_evaluation_does_not_count(write_run, tmp_path):
    """Near chance, a mean visits the target by luck, and leaves it again."""
    write_run("fedavg", [FEDAVG], [[0.2], [0.3], [0.2], [0.2]])
    write_run("fedmerge", [FEDMERGE], [[0.2], [0.1], [0.5], [0.6]])
    write_run("local", ["strategy=local", "baselines=[]"], [[0.1], [0.3], [0.1], [0.1]])
    frame = by_method(compare([tmp_path]))
    assert frame.loc["fedmerge", "rounds_to_target"] == 2
    assert frame.loc["fedavg", "rounds_to_target"] == 0
    assert frame.loc["local", "rounds_to_target"] == math.inf


def test_the_target_is_that_of_the_same_seed(write_run, tmp_path):
    """FedAvg ends with 0.3 and 0.7; each of its runs reaches its own final score."""
    for seed, (end, half) in enumerate([([0.2, 0.4], 0.1 + 0.2), ([0.6, 0.8], 0.4)]):
        write_run(f"fedavg-{seed}", [FEDAVG, f"seed={seed}"], [[0.0, 0.0], [0.1, 0.1], end])
        write_run(
            f"fedmerge-{seed}", [FEDMERGE, f"seed={seed}"], [[0.0, 0.0], [half, half], [0.7, 0.7]]
        )
    write_run("fedmerge-2", [FEDMERGE, "seed=2"], [[0.9, 0.9], [0.9, 0.9], [0.9, 0.9]])
    comparison = Comparison.of([tmp_path])
    frame = by_method(comparison.methods)
    assert frame.loc["fedavg", "rounds_to_target"] == 2
    assert frame.loc["fedmerge", "rounds_to_target"] == 1.5
    runs = comparison.runs.set_index(["method", "seed"])
    assert list(runs["target"]) == pytest.approx([0.3, 0.7, 0.3, 0.7, math.nan], nan_ok=True)
    assert list(runs["rounds_to_target"]) == pytest.approx([2, 2, 1, 2, math.nan], nan_ok=True)


def test_each_of_several_fedavgs_is_the_target_of_its_own_kind(write_run, tmp_path):
    for rank, end in ((4, 0.5), (8, 0.6)):
        write_run(f"fedavg-{rank}", [FEDAVG, f"lora.r={rank}"], [[0.0], [0.1], [end]])
        write_run(f"fedmerge-{rank}", [FEDMERGE, f"lora.r={rank}"], [[0.0], [0.5], [0.9]])
    write_run("fedmerge-16", [FEDMERGE, "lora.r=16"], [[0.0], [0.5], [0.9]])
    frame = by_method(compare([tmp_path]))
    assert list(
        frame.loc[["fedavg r=4", "fedavg r=8", "fedmerge r=4", "fedmerge r=8"], "rounds_to_target"]
    ) == [2, 2, 1, 2]
    assert math.isnan(frame.loc["fedmerge r=16", "rounds_to_target"])


@pytest.mark.parametrize(
    ("metric", "start", "end", "target"),
    [("test_accuracy", 0.0, 0.3, 0.1 + 0.2), ("test_perplexity", 1.0, 0.1 + 0.2, 0.3)],
)
def test_a_mean_that_is_off_by_rounding_reaches_the_target(write_run, metric, start, end, target):
    run = write_run("run", [], [[start], [end]], metric=metric)
    assert compare([run], target=target)["rounds_to_target"].item() == 1


def test_the_target_can_be_given(three_methods):
    frame = by_method(compare([three_methods], target=0.3))
    assert list(frame["rounds_to_target"]) == [1, 1, 1]
    assert set(compare([three_methods], target=0.95)["rounds_to_target"]) == {math.inf}


def test_without_fedavg_there_is_no_target(three_methods):
    comparison = Comparison.of(
        [three_methods / f"{method}-{seed}" for method in ("fedmerge", "local") for seed in (0, 1)]
    )
    assert comparison.methods[["target", "rounds_to_target"]].isna().all(axis=None)
    assert "rounds" not in markdown(comparison).lower()


@pytest.mark.parametrize(
    ("clients", "worst"), [(1, 0.0), (10, 0.0), (11, 0.5), (20, 0.5), (21, 1.0)]
)
def test_the_worst_tenth_is_rounded_up(write_run, clients, worst):
    run = write_run("run", [], [[0.0] * clients, list(range(clients))])
    assert compare([run])["worst_tenth"].item() == worst


def test_the_largest_scores_are_the_worst_if_less_is_better(write_run):
    write_run("fedavg", [FEDAVG], [[9.0, 9.0], [4.0, 6.0]], metric="test_perplexity")
    write_run(
        "fedmerge",
        [FEDMERGE],
        [[9.0, 9.0], [2.0, 4.0]],
        metric="test_perplexity",
        finetuned=[[7.0, 8.0]],
    )
    frame = compare(
        [write_run("local", [LOCAL], [[9.0, 9.0], [8.0, 8.0]], metric="test_perplexity").parent]
    )
    assert list(frame["method"]) == ["fedmerge", "fedavg", "local"]
    assert list(frame["worst_tenth"]) == [4.0, 6.0, 8.0]
    assert list(frame["gain_over_local"][:2]) == [5.0, 3.0]
    assert frame["finetuning"][0] == pytest.approx(1.5)
    assert list(frame["rounds_to_target"]) == [1, 1, math.inf]


def test_finetuning_and_gap_are_of_the_last_tenth_of_the_rounds(write_run):
    scores = [[0.0]] * 9 + [[0.2], [0.4], [0.5]]
    run = write_run(
        "run", [], scores, finetuned=[[1.0]] * 9 + [[0.3], [0.7]], gaps=[9.0] * 9 + [1.0, 2.0]
    )
    frame = compare([run])
    assert frame["finetuning"].item() == pytest.approx((0.1 + 0.3) / 2)
    assert frame["gap"].item() == 1.5


def test_scores_of_some_of_the_clients_are_left_out(write_run):
    """The scores of two of four clients are not an estimate of the mean over all four."""
    some, good = "clients.fraction=0.5", [0.9, 0.9]
    run = write_run(
        "run",
        [FEDAVG, some],
        [good, good, [0.9, 0.9, 0.1, 0.1]],
        finetuned=[[1.0, 1.0]] * 2,
        gaps=[1.0, 2.0],
    )
    comparison = Comparison.of([run])
    assert comparison.curves[["rounds", "mean"]].to_numpy().tolist() == [[2, 0.5]]
    assert comparison.methods["rounds_to_target"].item() == 2
    assert math.isnan(comparison.methods["finetuning"].item())
    assert comparison.methods["gap"].item() == 2.0
    comparison.plot().save(run / "figure.png")


def test_a_round_without_finetuning_is_accepted(write_run):
    run = write_run("run", ["strategy=fedavg_ft"], [[0.0], [0.5]], finetuned=None)
    assert math.isnan(compare([run])["finetuning"].item())


def test_an_infinite_score_is_accepted(write_run, tmp_path):
    write_run("a", [FEDAVG], [[9.0, 9.0], [math.inf, 6.0]], metric="test_perplexity")
    write_run("b", [FEDMERGE], [[9.0, 9.0], [2.0, 4.0]], metric="test_perplexity")
    comparison = Comparison.of([tmp_path])
    assert list(comparison.methods["mean"]) == [3.0, math.inf]
    assert "| fedavg | 1 | inf | inf |" in markdown(comparison)
    comparison.plot().save(tmp_path / "figure.png")


def test_missing_scores_are_nan(write_run):
    frame = compare([write_run("run", [], [[0.0], [0.5]])])
    empty = ["mean_std", "finetuning", "gap", "gain_over_local", "gain_over_fedavg"]
    assert frame[empty].isna().all(axis=None)


# ---- methods and settings ------------------------------------------------------------------------
def test_methods_are_named_by_the_settings_that_differ(write_run, tmp_path):
    for name, overrides in {
        "a": ["strategy.adapters=3"],
        "b": ["strategy.adapters=6"],
        "c": ["strategy.adapters=6", "lora.r=4"],
        "d": [FEDAVG],
        "e": [FEDAVG, "seed=3", "name=other"],
    }.items():
        write_run(name, overrides, [[0.0], [0.5]])
    frame = by_method(compare([tmp_path]))
    assert set(frame.index) == {
        "fedmerge adapters=3 r=2",
        "fedmerge adapters=6 r=2",
        "fedmerge adapters=6 r=4",
        "fedavg r=2",
    }
    assert frame.loc["fedavg r=2", "runs"] == 2


def test_evaluation_and_device_settings_make_no_other_method(write_run, tmp_path):
    ways = [
        "evaluation.every=5",
        "evaluation.finetuned=false",
        "evaluation.batch_size=8",
        "training.device=cpu",
        "training.prefix_cache=0",
        "training.clients_per_batch=1",
    ]
    for seed, way in enumerate(ways):
        write_run(f"fedmerge-{seed}", [FEDMERGE, f"seed={seed}", way], [[0.0], [0.5]])
        write_run(f"fedavg-{seed}", [FEDAVG, f"seed={seed}"], [[0.0], [0.4]])
    write_run("precise", [FEDMERGE, "training.mixed_precision=bf16"], [[0.0], [0.5]])
    frame = by_method(compare([tmp_path]))
    assert dict(frame["runs"]) == {
        "fedmerge mixed_precision=auto": 6,
        "fedavg mixed_precision=auto": 6,
        "fedmerge mixed_precision=bf16": 1,
    }
    assert frame.loc["fedmerge mixed_precision=auto", "gain_over_fedavg"] == pytest.approx(0.1)


def test_gains_are_over_the_counterpart_with_the_same_training(write_run, tmp_path):
    write_run("a", [FEDMERGE, "lora.r=4"], [[0.0], [0.9]])
    write_run("b", [FEDMERGE, "lora.r=8"], [[0.0], [0.8]])
    write_run("c", [FEDAVG, "lora.r=4"], [[0.0], [0.5]])
    write_run("d", [FEDAVG, "lora.r=8"], [[0.0], [0.6]])
    write_run("e", [LOCAL, "lora.r=8"], [[0.0], [0.7]])
    write_run("f", [FEDMERGE, "lora.r=16"], [[0.0], [0.8]])
    frame = by_method(compare([tmp_path]))
    assert frame.loc["fedmerge r=4", "gain_over_fedavg"] == pytest.approx(0.4)
    assert frame.loc["fedmerge r=8", "gain_over_fedavg"] == pytest.approx(0.2)
    # ambiguous: two runs of fedavg
    assert math.isnan(frame.loc["fedmerge r=16", "gain_over_fedavg"])
    assert frame.loc["fedmerge r=4", "gain_over_local"] == pytest.approx(0.2)  # there is but one


def test_other_data_are_another_setting(write_run, tmp_path):
    alpha = "data.partition={{scheme: dirichlet, clients: 2, alpha: {}}}".format
    write_run("a", [FEDMERGE, alpha(0.1)], [[0.0], [0.5]])
    write_run("b", [FEDMERGE, alpha(1.0)], [[0.0], [0.7]])
    write_run("c", [FEDAVG, alpha(1.0)], [[0.0], [0.9]])
    frame = compare([tmp_path])
    assert list(zip(frame["setting"], frame["method"], strict=True)) == [
        ("alpha=0.1", "fedmerge"),
        ("alpha=1.0", "fedavg"),
        ("alpha=1.0", "fedmerge"),
    ]
    assert math.isnan(frame["gain_over_fedavg"][0])
    assert frame["gain_over_fedavg"][2] == pytest.approx(-0.2)


def test_settings_are_named_after_their_recipes_if_these_differ(write_run, tmp_path):
    write_run("a", ["name=small", "data.max_train=4"], [[0.0], [0.5]])
    write_run("b", ["name=large", "data.max_train=8"], [[0.0], [0.5]])
    assert list(compare([tmp_path])["setting"]) == ["small", "large"]


# ---- selection of runs ---------------------------------------------------------------------------
def test_runs_are_found_at_any_depth_and_each_counts_once(write_run, tmp_path):
    run = write_run("deep/below/run", [FEDMERGE], [[0.0], [0.5]])
    write_run("deep/below/run/baselines/fedavg", [FEDAVG], [[0.0], [0.4]])
    for given in ([Run.open(run)], [tmp_path], [run, str(tmp_path / "deep"), Run.open(run)]):
        frame = compare(given)
        assert dict(zip(frame["method"], frame["runs"], strict=True)) == {
            "fedmerge": 1,
            "fedavg": 1,
        }


def test_unfinished_runs_are_left_out_with_a_notice(write_run, tmp_path, caplog):
    write_run("done", [FEDMERGE], [[0.0], [0.5]])
    stopped = write_run("stopped", [FEDAVG], [[0.0], [0.4]], finished=False)
    with caplog.at_level(logging.WARNING):
        assert list(compare([tmp_path])["method"]) == ["fedmerge"]
    assert caplog.messages == [f"left out of the comparison (not finished): {stopped}"]


def test_a_run_given_twice_counts_once_with_a_notice(write_run, tmp_path, caplog):
    write_run("a", [FEDMERGE], [[0.0], [0.5]])
    again = write_run("b", [FEDMERGE, "name=again"], [[0.0], [0.6]])
    with caplog.at_level(logging.WARNING):
        assert compare([tmp_path])["runs"].item() == 1
    reason = "same method and seed as another run"
    assert caplog.messages == [f"left out of the comparison ({reason}): {again}"]


def test_nothing_to_compare_is_an_error(write_run, tmp_path):
    with pytest.raises(RunError, match="nosuch does not exist"):
        compare([tmp_path / "nosuch"])
    with pytest.raises(RunError, match="holds no run"):
        compare([tmp_path])
    write_run("stopped", [], [[0.0], [0.4]], finished=False)
    with pytest.raises(RunError, match="no finished run"):
        compare([tmp_path])


def test_different_metrics_in_one_setting_are_an_error(write_run, tmp_path):
    write_run("a", [FEDMERGE], [[0.0], [0.5]])
    write_run("b", [FEDAVG, "task.metrics=[f1]"], [[0.0], [0.5]], metric="test_f1")
    with pytest.raises(
        RunError, match=r"a reports test_accuracy; .*b reports test_f1\. Choose one .* --metric"
    ):
        compare([tmp_path])
    with pytest.raises(RunError, match=r"b has no score test_accuracy; it has test_f1"):
        compare([tmp_path], metric="test_accuracy")


# ---- tables and figures --------------------------------------------------------------------------
def test_markdown_has_one_row_per_method_and_blanks_for_missing_values(three_methods):
    lines = markdown(Comparison.of([three_methods])).splitlines()
    assert lines[0] == "## smoke: final test accuracy of the served models"
    assert lines[2] == (
        "| method | runs | mean | worst 10 % | spread | gain over local | gain over fedavg | "
        "rounds to fedavg | MB down | MB up | seconds |"
    )
    assert lines[4].startswith(
        "| fedmerge | 2 | 0.700 ±0.141 | 0.600 ±0.141 | 0.100 | +0.200 ±0.283 | +0.200 ±0.141 | "
        "1.5 | 0.0002 |"
    )
    assert lines[5].startswith(
        "| fedavg | 2 | 0.500 ±0.000 | 0.350 ±0.071 | 0.150 | +0.000 ±0.141 |  | 2 | 0.0002 |"
    )
    assert "| never |" in lines[6]
    assert (
        "from which on the mean over all clients stayed at the final score of fedavg on the same "
        "seed or better." in lines[-1]
    )
    given = markdown(Comparison.of([three_methods], target=0.45))
    assert "| rounds to 0.450 |" in given
    assert "over all clients stayed at 0.450 or better." in given


@pytest.mark.parametrize("suffix", [".png", ".SVG"])
def test_figures_of_any_number_of_methods_and_settings_are_drawn(
    three_methods, write_run, tmp_path, suffix
):
    for adapters in range(2, 8):
        write_run(
            f"more-{adapters}",
            ["data.max_train=4", f"strategy.adapters={adapters}", "name=$x^2"],
            [[0.0], [0.5]],
        )
    path = tmp_path / f"figure{suffix}"
    Comparison.of([three_methods]).plot().save(path)
    assert path.stat().st_size > 5_000


def test_curves_are_the_means_by_round(three_methods):
    curves = Comparison.of([three_methods]).curves
    found = curves[curves["method"] == "fedmerge"].groupby("rounds")["mean"].agg(["mean", "std"])
    expected = pandas.DataFrame(
        {"mean": [0.1, 0.4, 0.7], "std": [0.0, math.sqrt(0.02), math.sqrt(0.02)]}, index=[0, 1, 2]
    )
    pandas.testing.assert_frame_equal(found, expected, check_names=False)
