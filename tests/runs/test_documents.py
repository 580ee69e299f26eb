"""A document with a valid sum but wrong content gives one error that names the file."""

import copy
import json

import pytest
import torch

from fedmerge_peft import FedMergeError, RunError, load_run
from fedmerge_peft.adapters.soup import AdapterSoup, OwnParts
from fedmerge_peft.runs import checkpoint, documents
from fedmerge_peft.runs.verify import verify
from fedmerge_peft.util import checked

VALUES = [None, True, 0, -1, 1.5, 1e308, 2**70, "", "text", "Infinity", [], [[]], {}, {"a": 1}]
MISSING = object()


def places(value, path=()):
    """Yield the path to each field, and to the first entry of each list."""
    entries = value.items() if isinstance(value, dict) else enumerate(value[:1])
    for key, inner in entries:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


def mutants(document):
    """Yield the document with each field replaced by a value of each type, or removed."""
    for path in places(document):
        for value in (*VALUES, MISSING):
            changed = copy.deepcopy(document)
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            if value is MISSING:
                del inner[path[-1]]
            else:
                inner[path[-1]] = value
            yield path, value, changed


def fault_of(call):
    """Return the error's message; an empty text if there is none."""
    try:
        call()
    except RunError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "name",
    ["environment.json", "clients.json", "task.json", "labels.json", "summary.json"],
)
def test_each_field_of_another_type_is_refused_by_name_or_read_as_its_type(run, name):
    path = run / name
    document = checked.read_document(path)
    refused = 0
    for place, value, changed in mutants(document):
        checked.write_document(path, changed)
        fault = fault_of(lambda: documents.read(path))
        assert not fault or (str(path) in fault and "\n" not in fault), (place, value)
        refused += bool(fault)
    assert refused > 8 * len(set(places(document)))


def test_the_fields_of_a_round_are_checked_line_by_line(run, write_records):
    path = run / "metrics.jsonl"
    records = checked.read_records(path).records
    refused = 0
    for place, value, changed in mutants(records[1]):
        write_records(path, [records[0], changed])
        fault = fault_of(lambda: documents.read_rounds(path))
        assert not fault or "metrics.jsonl:2 is damaged" in fault, (place, value)
        refused += bool(fault)
    assert refused > 8 * len(set(places(records[1])))
    write_records(path, [records[0], records[0]])
    with pytest.raises(RunError, match=r"metrics.jsonl:2 is damaged: round is 1: expected 2"):
        load_run(run).metrics  # noqa: B018


@pytest.mark.parametrize("name", ["decisions.json", "privacy.json", "scores.json"])
def test_documents_that_few_runs_have_are_checked_too(tmp_path, run, name):
    state = checked.read_document(run / "summary.json")["last"]
    document = {
        "decisions.json": {
            "learning_rate": {
                "value": 0.01,
                "reason": "chosen from 2 rates",
                "measure": "training loss",
                "start": {"a": 1.0},
                "trials": [{"learning_rate": 0.1, "training_loss": {"a": "Infinity", "b": None}}],
                "seconds": 1.0,
            }
        },
        "privacy.json": {
            "epsilon": 1.0,
            "delta": 1e-5,
            "noise": "simulation",
            "releases": {"fedmerge": [1, 1]},
        },
        "scores.json": state,
    }[name]
    path = tmp_path / name
    checked.write_document(path, document)
    assert documents.read(path)
    refused = 0
    for _, _, changed in mutants(document):
        checked.write_document(path, changed)
        fault = fault_of(lambda: documents.read(path))
        assert not fault or str(path) in fault
        refused += bool(fault)
    assert refused > 6 * len(set(places(document)))


@pytest.mark.parametrize(
    "changed",
    [
        {"r": "8"},
        {"r": 10**9},
        {"lora_alpha": None},
        {"target_modules": "(a+)+$"},  # PEFT matches it against the name of each module
        {"rank_pattern": {"(a*)*b": 4}},
        {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},  # PEFT imports it
        {"auto_mapping": {"base_model_class": "A", "parent_library": "os"}},
        {"init_lora_weights": "pissa"},
        {"fan_in_fan_out": "no"},
        {"peft_type": "IA3"},
        {"base_model_name_or_path": ["a"]},
    ],
)
def test_a_configuration_that_no_recipe_has_is_refused(run, changed):
    path = run / "adapter_config.json"
    checked.write_document(path, {**checked.read_document(path), **changed})
    with pytest.raises(RunError, match=r"adapter_config\.json is damaged"):
        load_run(run).adapter_config  # noqa: B018
    with pytest.raises(RunError, match=r"adapter_config\.json is damaged"):
        verify(run)


def test_a_configuration_lacks_no_key_of_the_recipe(run):
    path = run / "adapter_config.json"
    document = checked.read_document(path)
    for key in ("r", "lora_alpha", "target_modules", "peft_type"):
        checked.write_document(path, {k: v for k, v in document.items() if k != key})
        with pytest.raises(RunError, match=f"{key} is missing"):
            load_run(run).adapter_config  # noqa: B018


# ---- numbers of clients and adapters -------------------------------------------------------------
def own_parts(soup, clients):
    return AdapterSoup(
        soup.rows, soup.layout, own=OwnParts(torch.tensor([0]), torch.zeros(clients, 1))
    )


@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [
        ("soup.safetensors", lambda soup: own_parts(soup, 5), "own parts of 5 clients, expected 6"),
        (
            "soup.safetensors",
            lambda soup: AdapterSoup(soup.rows[:1], soup.layout),
            r"1 adapters, expected \d",
        ),
    ],
)
def test_a_soup_of_another_number_of_clients_or_adapters_is_refused(run, name, change, fault):
    soup = AdapterSoup.load(run / name)
    change(soup).save(run / name)
    for use in (load_run(run).state, lambda: verify(run)):
        with pytest.raises(RunError, match=rf"soup\.safetensors is damaged: it has {fault}"):
            use()
    own_parts(soup, 6).save(run / name)
    assert load_run(run).state()[0].own is not None


@pytest.mark.parametrize(
    "weights",
    [
        torch.ones(5, 5) / 5,
        torch.full((6, 5), float("nan")),
        torch.ones(6, 5, dtype=torch.int64),
        torch.ones(6),
        torch.ones(6, 0),
    ],
    ids=["clients", "nan", "integers", "vector", "empty"],
)
@pytest.mark.parametrize("name", ["weights.safetensors", "weights/round-00001.safetensors"])
def test_weights_of_another_shape_or_type_are_refused(run, name, weights):
    checked.write_tensors(run / name, {"weights": weights})
    with pytest.raises(RunError, match=rf"{name.rpartition('/')[2]} is damaged: "):
        verify(run)
    with pytest.raises(RunError, match="is damaged: "):
        (load_run(run).weights, list(load_run(run).weights_by_round()))


def test_label_counts_of_another_number_of_clients_are_refused(run):
    path = run / "labels.json"
    document = checked.read_document(path)
    checked.write_document(path, {**document, "counts": document["counts"][1:]})
    for use in (lambda: load_run(run).label_counts, lambda: verify(run)):
        with pytest.raises(RunError, match=r"labels\.json is damaged: it has 5 clients"):
            use()


# ---- metadata of tensors -------------------------------------------------------------------------
def test_each_field_of_a_soups_layout_is_checked(run):
    path = run / "soup.safetensors"
    tensors, note = checked.read_tensors(path)
    for place, value, changed in mutants(json.loads(note)[:2]):
        checked.write_tensors(path, tensors, json.dumps(changed))
        assert "soup.safetensors is damaged" in fault_of(lambda: AdapterSoup.load(path)), (
            place,
            value,
        )


@pytest.mark.parametrize(
    "change",
    [
        {"rows": torch.zeros(2, 3)},
        {"rows": torch.zeros(5, dtype=torch.float64)},
        {"base.a": torch.zeros(2)},
        {"own.columns": torch.tensor([0]), "own.residuals": torch.zeros(6, 1).double()},
        {"own.columns": torch.tensor([-1]), "own.residuals": torch.zeros(6, 1)},
        {"own.columns": torch.tensor([0])},
    ],
)
def test_each_tensor_of_a_soup_is_checked(run, change):
    path = run / "soup.safetensors"
    tensors, note = checked.read_tensors(path)
    checked.write_tensors(path, {**tensors, **change}, note)
    with pytest.raises(RunError, match=r"soup\.safetensors is damaged: it is not a soup"):
        AdapterSoup.load(path)


def test_each_field_of_a_checkpoint_is_checked(run):
    folder = run / "checkpoint"
    path = folder / "round-00002.safetensors"
    tensors, note = checked.read_tensors(path)
    document = json.loads(note)
    document["recipe"] = {}
    refused = 0
    for _, _, changed in mutants(document):
        checked.write_tensors(path, tensors, json.dumps(changed))
        fault = fault_of(lambda: checkpoint.read(folder, 2))
        assert not fault or "round-00002" in fault
        refused += bool(fault)
    assert refused > 8 * len(set(places(document)))


def test_a_recipe_of_any_length_is_refused_quickly(run):
    checked.write_text(run / "recipe.yaml", f"name: {'x' * 2**21}\n")
    with pytest.raises(FedMergeError, match=r"recipe\.yaml: exceeds the limit of 1048576 "):
        load_run(run).recipe  # noqa: B018
