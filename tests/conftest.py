"""Fixtures for tests of several packages."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

# before any Hugging Face library is imported: no test needs the hub
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# a test that keeps states on disk names a folder for them
os.environ.setdefault("FEDMERGE_PREFIX_DISK", "0")
# several threads on each processor are slower than one
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Skip tests with the mark ``gpu`` on a machine without a GPU, before their fixtures run."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA GPU, and this machine has none")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real data sets: FEDMERGE_DATA, or ../shared/data beside the repository.

    Skips if it does not exist.
    """
    folder = Path(os.environ.get("FEDMERGE_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(
            f"needs the real data sets, and {folder} does not exist; "
            "FEDMERGE_DATA names another folder"
        )
    return folder


@pytest.fixture(autouse=True)
def training_is_not_cached(monkeypatch):
    """Disable the cache of trained adapters, because tests compare runs that share an engine."""
    module = sys.modules.get("fedmerge_peft.engines.training_cache")
    if module is not None:

        def train_each_time(_cache, _job, train):
            begin = time.perf_counter()
            return module.TimedTraining(train(), time.perf_counter() - begin)

        monkeypatch.setattr(module.TrainingCache, "get_or_train", train_each_time)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny random models ``bert``, ``llama``, ``gpt2`` and ``vit``."""
    from fedmerge_peft.models import tiny

    folder = tmp_path_factory.mktemp("tiny-models")
    for kind in tiny.KINDS:
        tiny.write(kind, folder / kind)
    return folder


@pytest.fixture
def float64(tiny_models, monkeypatch):
    """Compute models, adapters and losses in float64 instead of float32."""
    import torch

    from fedmerge_peft.models import backbone

    def load_model(*args):
        model, missing = single(*args)
        return model.double(), missing

    single, default = backbone.load_model, torch.get_default_dtype()
    monkeypatch.setattr(backbone, "load_model", load_model)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch.nn.Module, "float", torch.nn.Module.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


@pytest.fixture(scope="session")
def smoke():
    """``smoke("strategy=ditto")``: a small form of the smoke recipe, with six clients."""
    from fedmerge_peft import Recipe

    def recipe(*overrides):
        small = [
            "data.max_train=8",
            "data.max_test=6",
            "data.filter.provider=[Alder, Birch]",
            "training.device=cpu",
            "baselines=[]",
        ]
        return Recipe.load("smoke", [*small, *overrides])

    return recipe


@pytest.fixture(scope="session")
def smoke_engine(smoke):
    """The engine that the smoke recipe loads, for all tests of a process."""
    from fedmerge_peft.engines.local import LocalEngine

    return LocalEngine.from_recipe(smoke())


@pytest.fixture
def formulas():
    """The class of clients with closed-form losses."""
    from fedmerge_peft.testing import FormulaClients

    return FormulaClients


@pytest.fixture(scope="session")
def write_records():
    """``write_records(path, records)``: write a ``metrics.jsonl``."""
    from fedmerge_peft.util import checked

    def write(path, records):
        path.unlink(missing_ok=True)
        digest = ""
        path.touch()
        for record in records:
            _, digest = checked.append_record(path, record, digest)

    return write


@pytest.fixture
def write_run(tmp_path, write_records):
    """``write_run("a", ["seed=1"], [[.1, .3], [.2, .4]])``: a finished run of ``smoke``.

    The lists are the clients' accuracies after 0, 1, ... rounds; the last are the final scores.
    Each round took two seconds, and 100 bytes down and 40 up for each client.
    """
    from fedmerge_peft.recipe import Recipe
    from fedmerge_peft.runs.formats import FORMAT
    from fedmerge_peft.util import checked

    def write(
        name, overrides, scores, metric="test_accuracy", finished=True, finetuned=None, gaps=None
    ):
        def of(values):
            clients = {f"client {number}": {metric: value} for number, value in enumerate(values)}
            return {
                "metric": metric,
                "mean": sum(values) / len(values),
                "worst": sum(sorted(values)[: -(-len(values) // 10)]) / -(-len(values) // 10),
                "worst_client": f"client {values.index(min(values))}",
                "worst_client_score": min(values),
                "validation_loss": None,
                "clients": clients,
            }

        folder = tmp_path / name
        folder.mkdir(parents=True)
        rounds = len(scores) - 1
        recipe = Recipe.load("smoke", ["baselines=[]", f"rounds={rounds}", *overrides])
        checked.write_text(folder / "recipe.yaml", recipe.to_yaml())
        checked.write_document(folder / "environment.json", {"format": FORMAT})
        records = [
            {
                "round": done + 1,
                "rounds": rounds,
                "seconds": 2.0,
                "train_loss": None,
                "served": of(scores[done]),
                "finetuned": finetuned and of(finetuned[done]),
                "gap": gaps and gaps[done],
                "weights_entropy": None,
                "adapter_mass": None,
                "update_norm": None,
                "bytes_down": 100 * len(scores[done]),
                "bytes_up": 40 * len(scores[done]),
                "epsilon": None,
                "noise": None,
                "clients": [f"client {number}" for number in range(len(scores[done]))],
            }
            for done in range(rounds)
        ]
        write_records(folder / "metrics.jsonl", records)
        if finished:
            clients = len(scores[-1])
            cost = {
                "rounds": rounds,
                "seconds": 2.0 * rounds,
                "bytes_down": 100 * clients * rounds,
                "bytes_up": 40 * clients * rounds,
            }
            last = {"after_round": rounds, "served": of(scores[-1])}
            summary = {
                **cost,
                "final": last,
                "last": last,
                "warnings": [],
            }
            checked.write_document(folder / "summary.json", summary)
        return folder

    return write


@pytest.fixture(scope="session")
def left_behind():
    """``left_behind(path)``: the contents of a run directory by file, without times and places."""
    import json
    from dataclasses import asdict

    from safetensors.torch import load_file
    from torch import uint8

    from fedmerge_peft.runs import checkpoint

    def timeless(value):
        if isinstance(value, dict):
            return {
                key: timeless(inner)
                for key, inner in value.items()
                if key not in ("seconds", "sha256")
            }
        return value

    def content(path):
        if path.name == "metrics.jsonl":
            return [timeless(json.loads(line)) for line in path.read_text().split("\n")[:-1]]
        if path.suffix == ".json":
            return timeless(json.loads(path.read_text()))
        if path.suffix != ".safetensors":
            return path.read_bytes()
        numbers = {
            name: (tensor.dtype, tensor.shape, tensor.reshape(-1).view(uint8).numpy().tobytes())
            for name, tensor in load_file(path).items()
        }
        if path.parent.name != "checkpoint" or ".soup" in path.name:
            return numbers
        read = checkpoint.read(path.parent, int(path.stem.removeprefix("round-")))
        # seconds have more or fewer digits, a header's keys have no order
        varying = {"metrics_bytes": 0, "metrics_sha256": ""}
        return numbers, {**asdict(read.manifest), **varying}

    def read(folder):
        names = {
            path.relative_to(folder).as_posix(): path
            for path in folder.rglob("*")
            if path.is_file()
        }
        return {
            name: content(path)
            for name, path in sorted(names.items())
            if path.name != "environment.json"
        }

    return read


class LabelTask:
    """The parts of a task that loading a backbone needs."""

    auto_model = "AutoModelForSequenceClassification"
    peft_task_type = "SEQ_CLS"
    heads = ("classifier", "score")
    unused = ()
    config_options = {}
    labels = ("a", "b", "c")
    pad_token_id = 0


class ImageTask(LabelTask):
    auto_model = "AutoModelForImageClassification"
    peft_task_type = None


class TextTask:
    auto_model = "AutoModelForCausalLM"
    peft_task_type = "CAUSAL_LM"
    heads = ()
    unused = ()
    config_options = {}
    labels = ()
    pad_token_id = 0


TASKS = {"bert": LabelTask, "vit": ImageTask, "gpt2": TextTask, "llama": TextTask}


@pytest.fixture
def make_backbone(tiny_models):
    """``make_backbone("bert", {"r": 4})``: a tiny backbone with that LoRA recipe."""
    import torch

    from fedmerge_peft.models.backbone import load_backbone
    from fedmerge_peft.recipe.backbone import BackboneRecipe
    from fedmerge_peft.recipe.lora import LoraRecipe

    def make(kind, lora=None, task=None, seed=0, **backbone):
        folder = str(tiny_models / kind)
        return load_backbone(
            BackboneRecipe(model=folder, **backbone),
            LoraRecipe(**lora or {}),
            task or TASKS[kind](),
            folder,
            torch.device("cpu"),
            seed,
        )

    return make
