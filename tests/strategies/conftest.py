"""A federation of formulas to run strategies in."""

import pytest

from fedmerge_peft.testing import FormulaClients


@pytest.fixture
def formulas():
    return FormulaClients
