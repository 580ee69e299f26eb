from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, List
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedmerge_peft.data.columns import encode_classes
from fedmerge_peft.data.partition import (
    assign_by_class,
    class_counts,
    client_names,
    clusters,
    dirichlet,
    generator,
    iid,
    natural,
    shards,
    split_off,
)
from fedmerge_peft.errors import DataError

seeds = st.integers(0, 2**32)


@st.composite
def class_lists(draw, fewest_rows=20, most_rows=200):
    """Class numbers in which every class from 0 occurs."""
    count = draw(st.integers(1, 8))
    rest = draw(
        arrays(np.int64, st.integers(fewest_rows, most_rows), elements=st.integers(0, count - 1))
    )
    return np.concatenate([np.arange(count), rest])


def held_rows(holdings):
    return np.sort(np.concatenate([holding.rows for holding in holdings]))


def assert_exact_cover(holdings, wanted):
    np.testing.assert_array_equal(held_rows(holdings), wanted)


@given(st.integers(1, 300), st.integers(1, 40), seeds)
def test_iid_partitions_are_exact_covers_of_equal_parts(examples, clients, seed):
    holdings = iid(examples, clients, generator(seed, "train"))
    assert_exact_cover(holdings, np.arange(examples))
    sizes = [len(holding.rows) for holding in holdings]
    assert max(sizes) - min(sizes) <= 1


@given(class_lists(), st.integers(1, 5), st.floats(0.3, 100), seeds)
def test_dirichlet_partitions_are_exact_covers(classes, clients, alpha, seed):
    holdings = dirichlet(classes, clients, alpha, 1, generator(seed, "train"))
    assert_exact_cover(holdings, np.arange(len(classes)))
    assert min(len(holding.rows) for holding in holdings) >= 1


@given(class_lists(), st.integers(1, 4), st.integers(0, 4), st.data(), seeds)
def test_cluster_partitions_are_exact_covers_of_the_chosen_classes(
    classes, groups, more, data, seed
):
    count = classes.max() + 1
    per_group = data.draw(st.integers(1, count))
    holdings = clusters(classes, groups + more, groups, per_group, generator(seed, "train"))
    chosen = np.unique(classes[held_rows(holdings)])
    assert_exact_cover(holdings, np.flatnonzero(np.isin(classes, chosen)))
    for group in {holding.group for holding in holdings}:
        seen = np.unique(
            classes[held_rows([holding for holding in holdings if holding.group == group])]
        )
        assert len(seen) <= per_group


@given(class_lists(), st.integers(1, 5), seeds)
def test_natural_partitions_are_exact_covers_and_never_mix_values(classes, clients_per_value, seed):
    names = [f"task{number}" for number in range(classes.max() + 1)]
    holdings = natural(classes, names, clients_per_value, generator(seed, "train"))
    assert_exact_cover(holdings, np.arange(len(classes)))
    assert len({holding.name for holding in holdings}) == len(names) * clients_per_value
    for number, name in enumerate(names):
        mine = [holding for holding in holdings if holding.group == name]
        assert_exact_cover(mine, np.flatnonzero(classes == number))
        sizes = [len(holding.rows) for holding in mine]
        assert max(sizes) - min(sizes) <= 1


@given(class_lists(fewest_rows=40), st.integers(1, 10), st.integers(1, 4), seeds)
def test_shard_partitions_are_exact_covers_of_few_classes_each(
    classes, clients, shards_per_client, seed
):
    holdings = shards(classes, clients, shards_per_client, generator(seed, "train"))
    assert_exact_cover(holdings, np.arange(len(classes)))
    longest_shard = -(-len(classes) // (clients * shards_per_client))
    smallest_class = np.bincount(classes).min()
    if smallest_class >= longest_shard:
        assert all(
            len(np.unique(classes[holding.rows])) <= 2 * shards_per_client for holding in holdings
        )


@given(class_lists(), st.integers(1, 6), st.data(), seeds)
def test_dealing_is_an_exact_cover_of_the_classes_with_a_share(classes, clients, data, seed):
    shares = data.draw(
        arrays(np.int64, (clients, int(classes.max()) + 1), elements=st.integers(0, 5))
    )
    dealt = assign_by_class(classes, shares, generator(seed, "test"))
    wanted = np.flatnonzero(shares.sum(axis=0)[classes] > 0)
    np.testing.assert_array_equal(np.sort(np.concatenate(dealt)), wanted)
    counts = class_counts(dealt, classes, shares.shape[1])
    quotas = np.bincount(classes) * shares / np.maximum(shares.sum(axis=0), 1)
    assert (np.abs(counts - quotas) < 1).all()


@given(
    st.integers(1, 60), st.floats(0, 0.6), st.floats(0, 0.39), st.none() | st.integers(1, 60), seeds
)
def test_set_aside_rows_are_disjoint_and_leave_some_to_train_on(
    count, validation, test, max_train, seed
):
    rows = np.arange(100, 100 + count)
    parts = split_off(rows, validation, test, max_train, generator(seed, "set aside"))
    together = np.concatenate(parts)
    assert len(np.unique(together)) == len(together)
    assert np.isin(together, rows).all()
    train, validated, tested = map(len, parts)
    assert train >= 1
    assert max_train is None or train + validated <= max_train
    if count >= 3:
        assert tested >= 1 or test == 0
        assert validated >= 1 or validation == 0 or max_train == 1
    if max_train is None:
        assert len(together) == count


def test_set_aside_fractions_are_parts_of_all_the_rows():
    train, validation, test = split_off(np.arange(100), 0.2, 0.2, None, generator(0, "set aside"))
    assert (len(train), len(validation), len(test)) == (60, 20, 20)
    train, validation, test = split_off(np.arange(100), 0.2, 0.2, 40, generator(0, "set aside"))
    assert (len(train), len(validation), len(test)) == (30, 10, 20)


def test_largest_remainders_get_the_rows_left_over():
    classes = np.zeros(10, dtype=np.int64)
    # quotas 1.67, 5, 3.33
    dealt = assign_by_class(classes, np.array([[1], [3], [2]]), generator(0, "test"))
    assert [len(rows) for rows in dealt] == [2, 5, 3]


def test_ties_go_to_the_client_with_the_fewest_rows():
    classes = np.repeat(np.arange(4), 1)
    dealt = assign_by_class(classes, np.ones((4, 4), dtype=np.int64), generator(0, "test"))
    assert [len(rows) for rows in dealt] == [1, 1, 1, 1]


def test_rows_without_a_class_are_left_out():
    classes = np.array([0, -1, 1, -1])
    dealt = assign_by_class(classes, np.array([[1, 1]]), generator(0, "test"))
    np.testing.assert_array_equal(dealt[0], [0, 2])


def test_groups_that_share_a_class_divide_its_rows_evenly():
    classes = np.repeat(np.arange(3), 40)
    holdings = clusters(classes, 4, 2, 3, generator(0, "train"))
    counts = class_counts([holding.rows for holding in holdings], classes, 3)
    np.testing.assert_array_equal(counts, np.full((4, 3), 10))
    assert [holding.name for holding in holdings] == [
        f"cluster-{g}-client-0{c}" for g in range(2) for c in range(2)
    ]
    assert [holding.group for holding in holdings] == [
        "cluster-0",
        "cluster-0",
        "cluster-1",
        "cluster-1",
    ]


def test_small_alpha_gathers_each_class_with_few_clients_and_large_alpha_spreads_it():
    classes = np.repeat(np.arange(10), 100)

    def largest_part(alpha):
        holdings = dirichlet(classes, 10, alpha, 1, generator(0, "train"))
        return class_counts([holding.rows for holding in holdings], classes, 10).max(axis=0).mean()

    assert largest_part(0.1) > 60
    assert largest_part(1000.0) < 20


def test_rounding_favors_no_client_of_a_dirichlet_partition():
    classes = np.repeat(np.arange(200), 3)
    sizes = [
        len(holding.rows) for holding in dirichlet(classes, 20, 100.0, 1, generator(0, "train"))
    ]
    assert max(sizes) < 3 * np.mean(sizes)


@pytest.mark.parametrize(
    "scheme",
    [
        lambda classes, rng: iid(len(classes), 4, rng),
        lambda classes, rng: dirichlet(classes, 4, 0.5, 5, rng),
        lambda classes, rng: clusters(classes, 4, 2, 3, rng),
        lambda classes, rng: natural(classes, list("abcdef"), 2, rng),
        lambda classes, rng: shards(classes, 4, 2, rng),
    ],
    ids=["iid", "dirichlet", "clusters", "natural", "shards"],
)
def test_a_seed_gives_one_partition_and_another_seed_another(scheme):
    classes = np.arange(120) % 6
    first, again, other = (scheme(classes, generator(seed, "train")) for seed in (7, 7, 8))
    for one, same in zip(first, again, strict=True):
        assert one.name == same.name
        np.testing.assert_array_equal(one.rows, same.rows)
    assert any(
        not np.array_equal(one.rows, another.rows)
        for one, another in zip(first, other, strict=True)
    )


def test_names_are_as_wide_as_the_count_needs():
    assert client_names(2) == ["client-00", "client-01"]
    assert client_names(101)[-1] == "client-100"
    assert client_names(101)[0] == "client-000"


def test_a_single_client_of_a_value_is_named_after_it():
    rng = generator(0, "train")
    assert [holding.name for holding in natural(np.array([0, 1]), ["snips", ""], 1, rng)] == [
        "snips",
        "(empty)",
    ]
    several = natural(np.zeros(4, dtype=np.int64), ["trec6"], 2, rng, groups=["questions"])
    assert [(holding.name, holding.group) for holding in several] == [
        ("trec6-0", "questions"),
        ("trec6-1", "questions"),
    ]


def test_dirichlet_refuses_too_few_examples_immediately():
    with pytest.raises(
        DataError,
        match=r"clients 5 × min_examples 10 is more than the number of training examples, 20;",
    ):
        dirichlet(np.zeros(20, dtype=np.int64), 5, 0.1, 10, generator(0, "train"))


def test_dirichlet_stops_after_many_draws_with_advice():
    with pytest.raises(
        DataError,
        match=(
            r"fewer training examples than min_examples, 9 \(at best \d+\); "
            r"raise data\.partition\.alpha, or lower"
        ),
    ):
        dirichlet(np.zeros(100, dtype=np.int64), 10, 0.01, 9, generator(0, "train"))


def hands(holdings, classes):
    """Return the classes of each group, in the order of the groups."""
    groups = dict.fromkeys(holding.group for holding in holdings)
    return [
        np.unique(classes[held_rows([each for each in holdings if each.group == group])])
        for group in groups
    ]


def test_groups_have_the_classes_of_a_deck_once_before_any_has_one_again():
    classes = np.repeat(np.arange(10), 30)
    for seed in range(20):
        holdings = clusters(classes, 5, 5, 4, generator(seed, "train"), deck=True)
        dealt = hands(holdings, classes)
        assert [len(hand) for hand in dealt] == [4] * 5  # all different within a group
        assert len(np.unique(np.concatenate(dealt[:2]))) == 8
        assert set(np.concatenate(dealt[:3])) == set(range(10))
        np.testing.assert_array_equal(np.bincount(np.concatenate(dealt)), [2] * 10)


def test_sizes_of_groups_spread_about_their_mean():
    classes = np.zeros(500, dtype=np.int64)
    seen = set()
    for seed in range(50):
        holdings = clusters(classes, 50, 5, 1, generator(seed, "train"), size_spread=0.3)
        sizes = Counter(holding.group for holding in holdings)
        assert (len(sizes), len(holdings)) == (5, 50)
        seen |= set(sizes.values())
    assert seen == {7, 8, 9, 10, 11, 12, 13}


@pytest.mark.parametrize(("clients", "groups"), [(3, 3), (7, 3), (100, 99)])
def test_each_group_has_a_client_at_any_spread(clients, groups):
    classes = np.zeros(500, dtype=np.int64)
    for seed in range(20):
        holdings = clusters(classes, clients, groups, 1, generator(seed, "train"), size_spread=0.99)
        assert len({holding.group for holding in holdings}) == groups
        assert len(holdings) == clients


def test_clusters_of_more_classes_than_there_are_are_refused():
    with pytest.raises(
        DataError,
        match=r"30 is more than the number of classes in the training examples, 2; .*=2 or less",
    ):
        clusters(np.array([0, 1, 0, 1]), 2, 1, 30, generator(0, "train"))


def test_more_shards_than_examples_are_refused():
    with pytest.raises(
        DataError,
        match=r"clients 3 × shards_per_client 2 is more than the number of training examples, 5;",
    ):
        shards(np.zeros(5, dtype=np.int64), 3, 2, generator(0, "train"))


def test_a_list_counts_by_its_first_value():
    lists = Dataset.from_dict({"labels": [["b", "a"], ["a"], ["c", "b"]]})
    named = lists.cast_column("labels", List(ClassLabel(names=["c", "b", "a"])))
    for table, names in ((lists, ["a", "b", "c"]), (named, ["c", "b", "a"])):
        numbers, found = encode_classes({"train": table}, "labels", "by", lists=True)
        assert found == names
        assert [names[number] for number in numbers["train"]] == ["b", "a", "c"]
    empty = Dataset.from_dict({"labels": [["a"], []]})
    with pytest.raises(DataError, match="labels is empty in 1 of the 2 train rows"):
        encode_classes({"train": empty}, "labels", "by", lists=True)
    with pytest.raises(DataError, match="the column labels has the type list<"):
        encode_classes({"train": lists}, "labels", "by")
