"""Rows that are kept in memory and in a file."""

import gc

import pytest
import torch

from fedmerge_peft.util import row_buffer
from fedmerge_peft.util.row_buffer import RowBuffer, as_matrix


def drawn(count, size=10):
    return list(torch.randn(count, 1, size, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("most", [0, 2**20], ids=["in a file", "in memory"])
def test_rows_are_unchanged_and_outlive_the_buffer(monkeypatch, most):
    monkeypatch.setattr(row_buffer, "BLOCK_BYTES", 120)  # three rows
    rows, keeper = drawn(10), RowBuffer(most)
    kept = [keeper.append(row) for row in rows]
    del keeper
    gc.collect()
    assert torch.equal(torch.cat(kept), torch.cat(rows))
    kept[4] += 1
    assert torch.equal(torch.cat(kept[5:]), torch.cat(rows[5:]))


def test_consecutive_rows_are_a_matrix_without_a_copy():
    keeper = RowBuffer()
    rows = [keeper.append(row)[0] for row in drawn(5)]
    assert as_matrix(rows).data_ptr() == rows[0].data_ptr()
    assert torch.equal(as_matrix(rows), torch.stack(rows))


def test_the_first_rows_of_consecutive_pairs_are_a_matrix_without_a_copy():
    keeper = RowBuffer()
    rows = [keeper.append(torch.cat([row, -row]))[0] for row in drawn(5)]
    assert as_matrix(rows).data_ptr() == rows[0].data_ptr()
    assert torch.equal(as_matrix(rows), torch.stack(rows))


@pytest.mark.parametrize("order", [[2, 0, 1], [0, 1, 3], [0, 0, 0], [1], [0, 1, 2, 2]], ids=str)
def test_rows_in_any_order_are_a_matrix_in_that_order(order):
    keeper = RowBuffer()
    rows = [keeper.append(row)[0] for row in drawn(5)]
    chosen = [rows[number] for number in order]
    assert torch.equal(as_matrix(chosen), torch.stack(chosen))
    apart = [row[0].clone() for row in drawn(3)]
    assert torch.equal(as_matrix(apart), torch.stack(apart))
    columns = list(torch.stack(apart).T)
    assert torch.equal(as_matrix(columns), torch.stack(apart).T)
