"""Names that look alike, and numbers with nouns."""

import unicodedata

from fedmerge_peft.util.text import closest, count_of, lookalikes

COMPOSED = "Zürich"
DECOMPOSED = unicodedata.normalize("NFD", COMPOSED)


def test_names_that_differ_in_case_spaces_or_invisible_characters_look_alike():
    names = [COMPOSED, "Bern", DECOMPOSED, "bern ", "B\u200bern", "Basel", "Basel"]
    assert lookalikes(names) == [[COMPOSED, DECOMPOSED], ["Bern", "bern ", "B\u200bern"]]


def test_a_name_in_another_form_of_unicode_is_close():
    assert closest(DECOMPOSED, ["Bern", COMPOSED]) == COMPOSED


def test_only_one_is_singular():
    assert [count_of(number, "test example") for number in (0, 1, 2_000)] == [
        "0 test examples",
        "1 test example",
        "2,000 test examples",
    ]
