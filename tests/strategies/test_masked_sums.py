"""Secure aggregation as docs/privacy.md describes it: W at the clients, masked sums at the server.

The package does not implement it. These tests hold what the documentation says about it.
"""

import re
from pathlib import Path

import pytest
import torch

from fedmerge_peft.strategies.server_step import (
    fedmerge_step,
    logits_step,
    soup_shares,
    weights_gradient,
)

ROOT = Path(__file__).parents[2]
CLIP, STEPS, MODULUS = 8.0, 2**22, 2**32
"""Flower's default precision: values within ±CLIP, in STEPS steps, summed modulo MODULUS."""


def to_integers(values):
    return ((values.clamp(-CLIP, CLIP) + CLIP) * (STEPS / (2 * CLIP))).round().long()


def to_sum(total, clients):
    return total.double() * (2 * CLIP / STEPS) - clients * CLIP


def masked(vectors, generator):
    """Add a mask to each of ``(m, n)`` vectors; the masks of each pair of clients cancel."""
    sent = vectors.clone()
    for i in range(len(vectors)):
        for j in range(i):
            mask = torch.randint(MODULUS, vectors[i].shape, generator=generator)
            sent[i] += mask
            sent[j] -= mask
    return sent % MODULUS


def test_masked_sums_give_the_step_of_single_updates_within_the_precision():
    generator = torch.Generator().manual_seed(0)
    d, size, clients = 5, 400, 8
    soup = torch.randn(d, size, generator=generator)
    logits = torch.randn(clients, d, generator=generator)
    deltas = torch.randn(clients, size, generator=generator) / 10
    examples = torch.randint(1, 50, (clients,), generator=generator).double()
    expected_soup, expected_logits = fedmerge_step(soup, logits, deltas, examples)

    # ---- at each client: its row of W, and the vector that it sends
    ratio = examples / examples.max()
    rows, sent = [], []
    for row, delta, share in zip(logits.double(), deltas, ratio, strict=True):
        gradient = weights_gradient(soup, row.softmax(0)[None], delta[None])
        rows.append(row - logits_step("normalized", gradient, share[None], 0.3)[0])
        weights = share * rows[-1].softmax(0)
        parts = torch.cat([weights[:, None] * delta, weights[:, None]], dim=1)
        sent.append(to_integers(parts.flatten()))
    uploads = masked(torch.stack(sent), generator)
    assert uploads.shape == (clients, d * (size + 1))

    # ---- at the server: sums alone
    sums = to_sum(uploads.sum(dim=0) % MODULUS, clients).view(d, size + 1)
    new_soup = soup.double() - sums[:, :-1] / sums[:, -1:]
    torch.testing.assert_close(torch.stack(rows).float(), expected_logits)
    mass = (ratio[:, None] * expected_logits.double().softmax(1)).sum(dim=0)
    bound = 4e-6 * ratio.sum() / mass
    assert ((new_soup - expected_soup.double()).abs().amax(dim=1) < bound).all()
    # an upload alone is uniform: it hides the client's update
    assert abs(float(uploads[0].double().mean()) / MODULUS - 0.5) < 0.05


def test_the_sum_of_an_adapter_that_one_client_uses_is_its_update():
    deltas = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    mixing = soup_shares(weights, torch.full((3,), 1 / 3, dtype=torch.float64))
    torch.testing.assert_close((mixing.T @ deltas)[0], deltas[0])


@pytest.mark.parametrize(
    ("row", "bytes_per_value", "adapters"),
    [
        ("now, float32", 4, 1),
        ("masked sums", MODULUS.bit_length() // 8, 5),
        ("CKKS", 2 * 8192 * 2 * 8 / 4096, 5),
    ],
)
def test_the_documented_bytes_follow_from_the_formulas(row, bytes_per_value, adapters):
    values = 32 * 2 * 16 * 8192  # layers, q and v, rank, the two sides of a matrix
    (line,) = re.findall(rf"^\| {row}.*$", (ROOT / "docs/privacy.md").read_text(), re.MULTILINE)
    number, unit = line.strip("| ").rpartition("|")[2].split()
    stated = float(number) * {"MB": 1e6, "GB": 1e9}[unit]
    assert stated == pytest.approx(values * bytes_per_value * adapters, rel=0.01)
