"""Factors A and B of an adapter's layers."""

import pytest
import torch

from fedmerge_peft import AdapterLayout, AdapterSoup, merge_error
from fedmerge_peft.adapters.lora_factors import (
    RANDOM_INIT_SUFFIXES,
    layer_factors,
    product_svd,
    rank_mask,
    suffix_mask,
)

pytestmark = pytest.mark.equality


def test_ranks_are_rows_of_a_and_columns_of_b_in_embeddings_too(make_backbone):
    backbone = make_backbone("bert", {"r": 3, "target_modules": ["query", "word_embeddings"]})
    row = backbone.fresh_row(0) + 1.0
    whole, part = (
        row.clone(),
        torch.where(rank_mask(backbone.layout, lambda _: slice(1, 3)), row, 0.0),
    )
    assert {layer.embedding for layer in layer_factors(backbone.layout)} == {True, False}
    for layer in layer_factors(backbone.layout):
        (a, b), (a_part, b_part) = layer.split(whole), layer.split(part)
        assert a.shape[0] == b.shape[1] == 3
        torch.testing.assert_close(b_part @ a_part, b[:, 1:] @ a[1:])
        assert not a_part[0].any()
        assert not b_part[:, 0].any()


def test_updates_that_are_no_product_of_two_matrices_are_refused():
    def layout(*shapes, role="lora"):
        return AdapterLayout.from_tensors([(f"a.{name}", shape, role) for name, shape in shapes])

    plain = [("lora_A.weight", (2, 3)), ("lora_B.weight", (3, 2)), ("lora_B.bias", (3,))]
    assert [layer.module for layer in layer_factors(layout(*plain))] == ["a"]
    others = {
        "is the factor of a convolution": layout(
            ("lora_A.weight", (2, 3, 3, 3)), ("lora_B.weight", (3, 2, 1, 1))
        ),
        "stacks several experts": layout(*plain, role="expert"),
        "DoRA's magnitudes": layout(*plain, ("lora_magnitude_vector", (3,))),
    }
    for reason, other in others.items():
        with pytest.raises(ValueError, match=reason):
            layer_factors(other)
        with pytest.raises(ValueError, match=rf"no exact merge: .*{reason}"):
            merge_error(AdapterSoup(torch.zeros(2, other.size), other), torch.tensor([0.5, 0.5]))
    for alone in (plain[0], plain[1], ("lora_embedding_A", (2, 5)), ("lora_embedding_B", (4, 2))):
        with pytest.raises(
            ValueError, match=rf"the other factor of a.{alone[0]} is frozen and shared"
        ):
            layer_factors(layout(alone))


def test_a_frozen_a_shares_the_randomly_initialized_factors(make_backbone):
    lora = {"r": 3, "target_modules": ["query", "word_embeddings"]}
    layout = make_backbone("bert", lora).layout
    random = {
        entry.key
        for entry in layout.entries
        if suffix_mask(layout, RANDOM_INIT_SUFFIXES)[entry.offset]
    }
    assert len({key.rpartition(".lora_")[2] for key in random}) == 2
    assert make_backbone("bert", {**lora, "merge": "shared_a"}).shared.keys() == random


def test_the_decomposition_through_small_factors_equals_the_dense_one():
    generator = torch.Generator().manual_seed(0)
    for rank in (2, 5, 40):
        b, a = torch.randn(7, rank, generator=generator), torch.randn(rank, 6, generator=generator)
        u, s, vh = product_svd(b, a)
        torch.testing.assert_close(u * s @ vh, b.double() @ a.double())
        torch.testing.assert_close(s, torch.linalg.svdvals(b.double() @ a.double())[: len(s)])
        torch.testing.assert_close(u.T @ u, torch.eye(len(s), dtype=torch.float64))
