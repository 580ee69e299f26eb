"""Models, names and files from others run no code, leave no folder and control no terminal."""

import ast
import json
import logging
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

import fedmerge_peft
from fedmerge_peft import AdapterSoup, BackboneError, Recipe, RecipeError, Run, RunError, federate
from fedmerge_peft.cli import main
from fedmerge_peft.recipe.strategies import FedMergeRecipe
from fedmerge_peft.strategies import Reply, make_strategy

SOURCE = Path(fedmerge_peft.__file__).parent
UNSAFE = {
    "pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "eval",
    "exec",
    "__import__",
    "unsafe_load",
    "full_load",
}
NASTY = [
    "\x1b[2Jgone",
    "../../outside",
    "/etc/passwd",
    "a\nb",
    "[red]x[/]",
    "\x9b31m",
    "..",
    "CON",
    "\u202eevil",
]


# ---- nothing of theirs runs ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", sorted(SOURCE.rglob("*.py")), ids=lambda path: path.relative_to(SOURCE).as_posix()
)
def test_nothing_unpickles_or_evaluates(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
            )
            assert not {module.partition(".")[0] for module in modules} & UNSAFE
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {
                *UNSAFE,
                "torch.load",
                "np.load",
                "numpy.load",
                "pd.read_pickle",
                "yaml.load",
                "yaml.unsafe_load",
            }
            assert not [word for word in node.keywords if word.arg == "allow_pickle"]


def test_code_that_comes_with_a_model_does_not_run(tiny_models, tmp_path):
    import shutil

    from fedmerge_peft.engines.local import LocalEngine

    folder = shutil.copytree(tiny_models / "bert", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": dict.fromkeys(
            ("AutoConfig", "AutoModelForSequenceClassification"), "mine.Mine"
        ),
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    assert Recipe.load("smoke").backbone.trust_remote_code is False
    with pytest.raises(BackboneError):
        LocalEngine.from_recipe(
            Recipe.load("smoke", [f"backbone.model={folder}", "training.device=cpu"])
        )
    assert not (tmp_path / "ran").exists()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_a_soup_of_arbitrary_bytes_is_one_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "soup.safetensors"
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"soup\.safetensors is damaged"):
        AdapterSoup.load(path)


# ---- no path leaves ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x", "a/b", "/abs", ".", "..", "", "a\0b", "x/..", "./x"])
def test_a_runs_name_is_a_single_folder_name(name):
    with pytest.raises(RecipeError, match="not a valid folder name"):
        Run.default_path(Recipe.load("smoke").model_copy(update={"name": name}))


@pytest.fixture
def nasty(tmp_path, monkeypatch):
    """A recipe whose clients, groups and labels have hostile names."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "text": f"ticket {n} about the printer",
            "team": NASTY[n % 2],
            "site": NASTY[n % len(NASTY)],
        }
        for n in range(90)
    ]
    Dataset.from_list(rows).to_parquet("rows.parquet")
    keys = [
        "name=nasty",
        "data.path=rows.parquet",
        "task.label=team",
        "data.partition.by=site",
        "data.partition.group=null",
    ]
    small = [
        "data.max_train=4",
        "data.max_test=2",
        "training.device=cpu",
        "baselines=[]",
        "rounds=1",
    ]
    return [*keys, *small]


def test_clients_with_any_names_write_nothing_elsewhere(nasty, tmp_path):
    before = {path for path in tmp_path.parent.rglob("*") if path.is_file()}
    run = federate(Recipe.load("smoke", nasty), tmp_path / "runs" / "nasty")
    assert set(run.clients.index) == set(NASTY)
    assert {name for record in run.records for name in record["clients"]} == set(NASTY)
    assert set(run.client_names) == set(NASTY)
    new = {path for path in tmp_path.parent.rglob("*") if path.is_file()} - before
    assert all(path.is_relative_to(run.path) for path in new)
    run.save_adapter("../../outside", tmp_path / "adapter")
    assert not [path for path in (tmp_path / "adapter").rglob("*") if "outside" in path.name]


# ---- no terminal obeys ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more", [[], ["clients.failures=skip", "clients.timeout=1e-9"], ["clients.timeout=1e-9"]]
)
def test_names_from_the_data_are_escaped_in_the_terminal(nasty, capsys, more):
    for command in (["data", "smoke", *nasty], ["run", "smoke", *nasty, *more, "--out", "out"]):
        with pytest.raises(SystemExit):
            main(command)
    output = "".join(capsys.readouterr())
    steering = [line for line in output.split("\n") if not line.isprintable()]
    assert steering == []
    assert "\\x1b[2Jgone" in output


def test_log_lines_have_no_control_characters(capsys):
    from rich.console import Console

    from fedmerge_peft.util.logs import configure_logging

    package = logging.getLogger("fedmerge_peft")
    handlers, propagate = package.handlers, package.propagate
    try:
        configure_logging(Console(stderr=True, highlight=False))
        package.warning("client %s, round 3: no luck; skipped", "\x1b]0;owned\x07")
    finally:
        package.handlers, package.propagate = handlers, propagate
    output = capsys.readouterr().err
    assert "\x1b" not in output
    assert "\\x1b]0;owned\\x07" in output


# ---- invariants of the update rule ---------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["normalized", "adam", "gradient", "paper"]),
    st.sampled_from(["independent", "noise", "identical"]),
    st.lists(st.sets(st.integers(0, 4), min_size=1), min_size=1, max_size=4),
    st.floats(1e-8, 1e6),
    st.integers(0, 1000),
)
def test_weights_sum_to_one_and_those_of_absent_clients_do_not_change(
    rule, begin, cohorts, scale, seed
):
    from fedmerge_peft import AdapterLayout
    from fedmerge_peft.strategies import StrategyContext

    layout = AdapterLayout.from_tensors(
        [("a.lora_A.weight", (2, 3), "lora"), ("head.weight", (2, 3), "head")]
    )
    generator = torch.Generator().manual_seed(seed)
    start = StrategyContext(
        5, layout, lambda number: torch.randn(12, generator=torch.Generator().manual_seed(number))
    )
    strategy = make_strategy(
        FedMergeRecipe(name="fedmerge", adapters=3, rule=rule, start=begin), start
    )
    for cohort in cohorts:
        before = strategy.merging.logits.clone()
        strategy.update(
            [
                Reply(client, scale * torch.randn(1, 12, generator=generator), 10, 1.0, 0.0)
                for client in cohort
            ]
        )
        others = [client for client in range(5) if client not in cohort]
        assert torch.equal(strategy.merging.logits[others], before[others])
        torch.testing.assert_close(strategy.weights.sum(dim=1), torch.ones(5))
        assert bool((strategy.weights >= 0).all())
        assert strategy.soup.rows.isfinite().all()
