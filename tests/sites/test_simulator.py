"""A job in NVIDIA FLARE's simulator: sites train in the job's process, without certificates."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedmerge_peft import Recipe, Run, federate

PROGRAM = Path(__file__).with_name("simulated.py")


@pytest.mark.slow
def test_a_job_in_the_simulator_equals_one_machine(tmp_path):
    from fedmerge_peft.sites.flare.job_files import write_job
    from fedmerge_peft.sites.flare.names import CONTROLLER, EXECUTOR
    from fedmerge_peft.sites.rehearse import prepare_rehearsal

    small = [
        "data.max_train=4",
        "data.max_test=3",
        "data.filter.provider=[Alder, Birch]",
        "training.device=cpu",
        "baselines=[]",
        "rounds=2",
    ]
    recipe = Recipe.load("smoke", [*small, "training.clients_per_batch=1"])
    federation = prepare_rehearsal(recipe, 2, tmp_path / "kits")
    job = write_job(tmp_path / "job")
    for config in (job / "app" / "config").glob("*.json"):
        text = (
            config.read_text()
            .replace(CONTROLLER, "simulated.Controller")
            .replace(EXECUTOR, "simulated.Executor")
        )
        config.write_text(text)
    local = tmp_path / "workspace" / "local"
    local.mkdir(parents=True)
    (local / "resources.json").write_text(
        json.dumps({"format_version": 2, "class_allow_list": ["simulated."], "components": []})
    )
    environment = {
        **os.environ,
        "FEDMERGE_SIMULATED": str(tmp_path / "kits"),
        "PYTHONPATH": str(PROGRAM.parent),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, PROGRAM, tmp_path / "workspace", job, ",".join(federation.sites)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    outcome = (
        json.loads(next((tmp_path / "workspace").rglob("outcome.json")).read_text())
        if done.returncode == 0
        else {}
    )
    assert outcome.get("state") == "ended", done.stdout + done.stderr
    assert set(outcome["adapters"].values()) == {None}
    (soup, weights), (local_soup, local_weights) = (
        run.state()
        for run in (
            Run.open(tmp_path / "kits" / "server" / "run"),
            federate(recipe, tmp_path / "one"),
        )
    )
    assert torch.equal(soup.rows, local_soup.rows)
    assert torch.equal(weights, local_weights)
