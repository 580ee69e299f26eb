"""Partition schemes that return only some of the splits."""

import numpy as np

from fedmerge_peft import ClientRows, register_partition
from fedmerge_peft.data import federate_data
from fedmerge_peft.recipe.data import DataRecipe
from fedmerge_peft.testing import isolated_registries


def test_a_scheme_keeps_the_splits_that_it_assigns_itself(tmp_path, table):
    def halves(recipe, splits):
        def assign(split, first):
            own = np.split(np.arange(len(splits.tables[split])), [first])
            return [ClientRows(name, part) for name, part in zip("ab", own, strict=True)]

        return {"train": assign("train", 5), "test": assign("test", 3)}

    with isolated_registries():
        register_partition("halves")(halves)

        rows = table.to_pandas()
        rows["split"] = np.arange(len(rows)) % 3
        rows["split"] = rows["split"].map({0: "train", 1: "validation", 2: "test"})
        rows.to_csv(tmp_path / "rows.csv", index=False)
        data = federate_data(
            DataRecipe(
                path=str(tmp_path / "rows.csv"),
                split_column="split",
                partition={"scheme": "halves"},
            ),
            "label",
            0,
        )
    (a, b) = data.clients
    assert (len(a.train), len(a.test)) == (5, 3)
    assert len(a.validation) + len(b.validation) == sum(rows["split"] == "validation")
    assert len(a.validation) > 0
