"""Rows in bfloat16 or on disk: what is stored is what was put there, rounded without bias."""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedmerge_peft import RunError
from fedmerge_peft.util import files, row_storage
from fedmerge_peft.util.row_storage import (
    RowStorage,
    StochasticRounding,
    column_chunks,
    mix,
    on_disk,
    read,
    release,
    write,
)

FORMATS = (torch.float32, torch.bfloat16)
STORAGES = [RowStorage(dtype, disk) for dtype in FORMATS for disk in (False, True)]
ROWS = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of eight columns of three rows."""
    monkeypatch.setattr(row_storage, "CHUNK_BYTES", 100)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_stored_rows_are_those_given_in_the_nearest_numbers(storage):
    stored = storage.store(ROWS, 3)
    release(stored)  # the pages come back from the file
    assert stored.dtype == storage.dtype
    assert on_disk(stored) == storage.on_disk
    assert torch.equal(stored, ROWS.to(storage.dtype))


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_chunks_cover_the_columns_in_order(storage):
    stored = storage.store(ROWS, 3)
    chunks = [read(stored, columns) for columns in column_chunks(stored)]
    assert len(chunks) == (1 if storage.plain else 7)
    assert torch.equal(torch.cat(chunks, dim=1), stored.float())


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_columns_are_written_where_they_are_read(storage):
    stored = storage.store(ROWS, 3)
    write(stored, slice(10, 20), -ROWS[:, 30:40].to(storage.dtype))
    expected = torch.cat([ROWS[:, :10], -ROWS[:, 30:40], ROWS[:, 20:]], dim=1).to(storage.dtype)
    assert torch.equal(stored, expected)
    some = torch.tensor([40, 2, 2])
    assert torch.equal(read(stored, some), expected[:, some].float())


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("shape", [(3,), (4, 3)])
def test_mixtures_are_computed_in_float32(storage, shape):
    stored, weights = storage.store(ROWS, 3), torch.rand(shape)
    torch.testing.assert_close(mix(weights, stored), weights @ stored.float())


def test_a_file_lies_in_the_folder_without_a_name_and_goes_with_its_rows(tmp_path):
    stored = RowStorage(on_disk=True, folder=tmp_path).store(ROWS, 3)
    assert list(tmp_path.iterdir()) == []
    known = len(row_storage._MAPPINGS)
    del stored
    assert len(row_storage._MAPPINGS) == known - 1


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="space is reserved on POSIX only")
def test_a_full_disk_is_noticed_before_rows_are_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RunError, match=r"a soup of 4,000\.0 MB cannot be stored \(No space left"):
        RowStorage(on_disk=True, folder=tmp_path).empty(10, 10**8)


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_file_written_in_chunks_has_the_bytes_of_the_library(tmp_path, dtype):
    others = {
        "a.columns": torch.arange(3),
        "shared.é": torch.ones(2, 2),
        "own.private": torch.tensor(True),
        "empty": torch.zeros(0, 4),
    }
    note = ("key", '{"note": "…"}')
    files.write_tensors(
        tmp_path / "chunks", {"rows": RowStorage(dtype, True).store(ROWS, 3), **others}, note
    )
    whole = {"rows": ROWS.to(dtype), **others}
    save_file(whole, tmp_path / "whole", metadata=dict([note]))
    assert (tmp_path / "chunks").read_bytes() == (tmp_path / "whole").read_bytes()
    assert torch.equal(load_file(tmp_path / "chunks")["rows"], whole["rows"])


# ---- rounding ------------------------------------------------------------------------------------


def test_small_steps_are_lost_by_rounding_to_the_nearest_and_kept_on_average_at_random():
    nearest = at_random = torch.ones(1, 4000, dtype=torch.bfloat16)
    for number in range(300):  # 1 ± 0.001 lies nearer to 1 than to its neighbors
        nearest = (nearest.float() + 1e-3).to(torch.bfloat16)
        at_random = StochasticRounding(number).round(at_random.float() + 1e-3)
    assert bool((nearest == 1).all())
    # The deviation of a sum is at most 300^½ · 2⁻⁷ / 2 = 0.068, and of the mean 0.0011.
    assert abs(float(at_random.float().mean()) - 1.3) < 0.005


def test_a_value_goes_to_a_neighbor_with_its_distance_from_the_other_as_the_probability():
    value = 1 + 0.25 * 2**-7
    for sign in (1, -1):
        rounded = sign * StochasticRounding(0).round(torch.full((1, 100_000), sign * value)).float()
        assert set(rounded.unique().tolist()) == {1.0, 1 + 2**-7}
        assert abs(float((rounded > 1).float().mean()) - 0.25) < 0.01


def test_values_in_bfloat16_do_not_change():
    values = torch.cat([ROWS, 1e-30 * ROWS, torch.zeros(3, 1)], dim=1).bfloat16()
    assert torch.equal(StochasticRounding(0).round(values.float()), values)


def test_equal_rows_stay_equal_and_chunks_change_no_bit():
    values = ROWS[:1].expand(3, -1)
    rounded = StochasticRounding(5).round(values)
    assert torch.equal(rounded, rounded[:1].expand(3, -1))
    again = StochasticRounding(5)
    parts = [again.round(part) for part in values.split(12, dim=1)]
    assert torch.equal(torch.cat(parts, dim=1), rounded)
    assert not torch.equal(StochasticRounding(6).round(values), rounded)


def test_values_that_are_not_finite_stay_so():
    bad = torch.tensor([0x7FFFFFFF, 0x7F800001, -1, 0x7F800000], dtype=torch.int32)
    values = torch.cat([bad.view(torch.float32), torch.tensor([-torch.inf])]).repeat(1, 1000)
    assert not torch.isfinite(StochasticRounding(0).round(values)).any()
