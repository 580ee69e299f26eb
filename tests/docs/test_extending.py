"""The code of docs/extending.md registers its parts, and recipes run with them."""

import re
from pathlib import Path

import yaml

from fedmerge_peft import Recipe, federate
from fedmerge_peft.testing import isolated_registries

TEXT = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def test_the_code_registers_parts_that_a_recipe_then_runs_with(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with isolated_registries():
        names = {"__name__": "extending"}
        for block in blocks("python"):
            exec(compile(block, "extending.md", "exec"), names)
        (callbacks,) = (yaml.safe_load(block)["callbacks"] for block in blocks("yaml"))
        recipe = Recipe.load(
            "smoke",
            [
                (
                    "task={name: smoothed-classification, label: queue, "
                    "metrics: [error_rate], max_length: 32}"
                ),
                "data.partition={scheme: stripes, clients: 4}",
                "strategy={name: damped, damping: 0.25}",
                "robustness.aggregation=sign",
                f"callbacks={callbacks}",
                "baselines=[]",
                "training.device=cpu",
            ],
        )
        run = federate(recipe, tmp_path / "run")
        assert run.client_names == ["client-0", "client-1", "client-2", "client-3"]
        assert 0 <= run.summary["final"]["served"]["mean"] <= 1
        assert "round 2: loss" in capsys.readouterr().out
