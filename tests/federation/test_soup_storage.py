"""Runs whose server stores the soup in bfloat16 or on disk."""

import pytest
import torch
from safetensors.torch import load_file

from fedmerge_peft import Callback, federate
from fedmerge_peft.report.page import write_report
from fedmerge_peft.runs.verify import verify
from fedmerge_peft.serving.export import export_client, export_soup
from fedmerge_peft.util.row_storage import on_disk

FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
START = ["rounds=2", "strategy.start=independent", "strategy.adapters=3", "evaluation.serve=best"]


@pytest.fixture(
    scope="module",
    params=[(name, place) for name in FORMATS for place in ("memory", "disk")][1:],
    ids="-".join,
)
def run(request, smoke, smoke_engine, tmp_path_factory):
    """A finished run, its number format, and the soup of its server."""
    dtype, storage = request.param
    soup = f"strategy.soup={{dtype: {dtype}, storage: {storage}}}"
    federations = []
    on_start = Callback(on_start=lambda federation, _: federations.append(federation))
    recipe = smoke("strategy=fedmerge", *START, soup)
    path = tmp_path_factory.mktemp("runs") / "run"
    done = federate(recipe, path, engine=smoke_engine.with_recipe(recipe), callbacks=[on_start])
    server = federations[0].strategy.soup
    assert on_disk(server.rows) == (storage == "disk")
    assert server.storage.folder == path
    return done, FORMATS[dtype], server


def test_the_files_are_in_the_number_format_and_verified(run):
    done, dtype, server = run
    stored = load_file(max(done.path.glob("checkpoint/*.soup.safetensors")))["rows"]
    assert stored.dtype == dtype
    assert torch.equal(stored, server.rows)
    assert verify(done.path) > 10  # and no other file is in the directory


def test_readers_get_float32(run):
    done = run[0]
    stored = load_file(done.path / "soup.safetensors")["rows"]
    assert torch.equal(done.soup.rows, stored.float())
    client = done.client_names[0]
    weights = torch.tensor(done.weights.loc[client].to_numpy())
    merged = done.soup.state_dict(weights @ stored.float())
    served = done.adapter(client)
    assert {tensor.dtype for tensor in served.values()} == {torch.float32}
    for name, tensor in served.items():
        torch.testing.assert_close(tensor, merged[name])


def test_exports_and_reports_are_written(run, tmp_path):
    done = run[0]
    exported = export_client(done, done.client_names[0], tmp_path / "client")
    served = done.adapter(done.client_names[0])
    written = load_file(exported / "adapter_model.safetensors")
    assert all(torch.equal(written[name], served[name]) for name in served)
    soup = export_soup(done, tmp_path / "soup")
    for file in soup.rglob("adapter_model.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}
    assert write_report([done.path], tmp_path / "report.html").stat().st_size > 1000
