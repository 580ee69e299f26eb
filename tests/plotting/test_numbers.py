"""Numbers in figures are short, and never in scientific notation between 0.01 and infinity."""

import math

import pytest

from fedmerge_peft.plotting.svg_marks import number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.00123, "0.0012"),
        (0.01234, "0.0123"),
        (-1.236, "-1.24"),
        (999.4, "999"),
        (999.5, "1,000"),
        (999.9, "1,000"),
        (-999.7, "-1,000"),
        (1000, "1,000"),
        (123456.7, "123,457"),
        (math.inf, "∞"),
        (-math.inf, "–"),
        (math.nan, "–"),
    ],
)
def test_a_number_has_three_digits_and_is_an_integer_from_1000_on(value, text):
    assert number(value) == text
