"""The newcomer's table: its offices, its desks, and a recipe without settings."""

from pathlib import Path

import pytest

QUALITY = Path(__file__).parents[2] / "benchmarks" / "quality"


@pytest.fixture
def own_table(monkeypatch):
    monkeypatch.syspath_prepend(str(QUALITY))
    import own_table

    return own_table


def test_table_has_three_hundred_rows_of_six_offices_and_all_desks_in_each(own_table):
    table = own_table.letters(seed=3)

    assert len(table) == 300
    assert set(table["office"].value_counts()) == {own_table.ROWS}
    assert (table.groupby("office")["desk"].nunique() == len(own_table.DESKS)).all()
    assert not table["letter"].str.contains("[{}]").any()


def test_offices_choose_the_desk_by_topic_or_by_time_in_turn(own_table):
    table = own_table.letters(seed=3)

    for index, office in enumerate(own_table.OFFICES):
        rows = table[table["office"] == office]
        rules = own_table.TIMES if index % 2 else own_table.TOPICS
        starts = {
            desk: tuple(phrase.split("{")[0] for phrase in phrases)
            for desk, phrases in rules.items()
        }
        for letter, desk in zip(rows["letter"], rows["desk"], strict=True):
            named = [
                each for each, found in starts.items() if any(part in letter for part in found)
            ]
            assert desk in named


def test_recipe_has_path_columns_and_backbone_alone(own_table, tmp_path):
    table = tmp_path / "letters.csv"
    own_table.letters(seed=0).to_csv(table, index=False)

    recipe = own_table.recipe(table, seed=0)

    assert recipe.strategy.name == "fedmerge"
    assert recipe.training.learning_rate == "auto"
    assert recipe.strategy.adapters == "auto"
