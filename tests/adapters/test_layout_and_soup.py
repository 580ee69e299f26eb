import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmerge_peft import AdapterLayout, AdapterSoup, MergingWeights, RunError
from fedmerge_peft.adapters import merging_weights

SHAPES = st.lists(
    st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple), min_size=1, max_size=6
)


def layout_of(shapes):
    return AdapterLayout.from_tensors(
        (f"layer.{n}.weight", shape, "head" if n == 0 else "lora") for n, shape in enumerate(shapes)
    )


@given(SHAPES)
def test_a_row_survives_the_round_trip_through_named_tensors(shapes):
    layout = layout_of(shapes)
    row = torch.arange(layout.size, dtype=torch.float32)
    state = layout.state_dict(row)
    assert [tuple(tensor.shape) for tensor in state.values()] == shapes
    assert torch.equal(layout.row(state), row)


@given(SHAPES)
def test_a_layout_survives_json(shapes):
    layout = layout_of(shapes)
    assert AdapterLayout.from_json(layout.to_json()) == layout


def test_columns_of_a_role_are_those_of_its_tensors():
    layout = layout_of([(2, 2), (3,), (1,)])
    assert layout.columns("head").tolist() == [0, 1, 2, 3]
    assert layout.columns("lora").tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("layer.1.weight"), r"lacks 1 of 2 tensors, first layer.1.weight"),
        (lambda state: state.update(other=torch.zeros(1)), "not in the layout, first other"),
        (
            lambda state: state.update({"layer.0.weight": torch.zeros(9)}),
            r"shape \(9,\), expected \(2, 2\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_a_layout_are_refused(change, message):
    layout = layout_of([(2, 2), (3,)])
    state = layout.state_dict(torch.zeros(7))
    change(state)
    with pytest.raises(ValueError, match=message):
        layout.row(state)


def test_a_row_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"has shape \(7,\), got"):
        layout_of([(2, 2), (3,)]).state_dict(torch.zeros(8))


def test_merging_is_the_weighted_sum_of_rows():
    layout = layout_of([(2,)])
    soup = AdapterSoup(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), layout)
    assert soup.merge(torch.tensor([0.25, 0.75])).tolist() == [0.25, 1.5]
    assert soup.merge(torch.tensor([[1.0, 0.0], [0.5, 0.5]])).tolist() == [[1.0, 0.0], [0.5, 1.0]]


def test_a_soup_survives_its_file(tmp_path):
    soup = AdapterSoup(
        torch.randn(3, 7), layout_of([(2, 2), (3,)]), {"layer.a.weight": torch.randn(4, 2)}
    )
    soup.save(tmp_path / "soup.safetensors")
    again = AdapterSoup.load(tmp_path / "soup.safetensors")
    assert torch.equal(again.rows, soup.rows)
    assert again.layout == soup.layout
    assert torch.equal(again.shared["layer.a.weight"], soup.shared["layer.a.weight"])


@pytest.mark.parametrize(
    "content", [b"", b"not safetensors", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "]
)
def test_a_file_that_is_no_soup_is_refused(tmp_path, content):
    (tmp_path / "soup.safetensors").write_bytes(content)
    with pytest.raises(RunError, match="is damaged: "):
        AdapterSoup.load(tmp_path / "soup.safetensors")


def test_rows_of_another_layout_are_refused():
    with pytest.raises(ValueError, match=r"shape \(d, 7\)"):
        AdapterSoup(torch.zeros(2, 8), layout_of([(2, 2), (3,)]))


def test_uniform_weights_have_full_entropy_and_even_mass():
    weights = MergingWeights.uniform(5, 4).softmax()
    assert merging_weights.entropy(weights) == pytest.approx(1.0)
    assert merging_weights.adapter_shares(weights) == pytest.approx([0.25] * 4)


def test_one_hot_weights_have_no_entropy():
    assert merging_weights.entropy(torch.eye(3)) == 0.0
    assert merging_weights.entropy(torch.ones(4, 1)) == 0.0


def test_weights_that_have_not_moved_are_warned_about():
    assert "still uniform" in merging_weights.weight_warnings(torch.full((6, 3), 1 / 3))[0]


def test_unused_adapters_are_warned_about_by_number():
    weights = torch.tensor([[0.98, 0.01, 0.01], [0.01, 0.98, 0.01]])
    assert merging_weights.weight_warnings(weights) == [
        "adapter 2 (numbered from 0) is unused: its mean merging weight over the clients is below "
        "a quarter of 1/3"
    ]
    assert merging_weights.weight_warnings(torch.eye(3)) == []
    assert merging_weights.weight_warnings(torch.ones(3, 1)) == []
