"""Any file or command line gives a recipe or a ``RecipeError`` of plain lines."""

import copy

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmerge_peft.errors import RecipeError
from fedmerge_peft.recipe.error_messages import _keys
from fedmerge_peft.recipe.schema import Recipe
from fedmerge_peft.recipe.yaml_document import write

KEYS = sorted({key for _, _, key in _keys(Recipe)})
TAGS = [
    "fedmerge",
    "fedavg",
    "local",
    "iid",
    "dirichlet",
    "clusters",
    "natural",
    "shards",
    "causal-lm",
    "image-classification",
]
VALID = Recipe.model_validate(
    {
        "name": "x",
        "task": "sequence-classification",
        "backbone": {"model": "m"},
        "data": {"path": "p", "partition": {"scheme": "dirichlet", "clients": 2}},
        "baselines": ["fedavg", "local"],
    }
).model_dump()

TOKENS = [
    "\n",
    "\n  ",
    "\n    ",
    ": ",
    ":",
    "- ",
    "[",
    "]",
    "{",
    "}",
    ", ",
    "#",
    "&a ",
    "*a",
    "!!int ",
    "!x ",
    "---",
    "...",
    "%YAML",
    "|",
    ">",
    "?",
    "'",
    '"',
    "\\x",
    "\t",
    "@",
    "`",
    "~",
]
YAML_LIKE = st.lists(st.one_of(st.sampled_from([*TOKENS, *KEYS, *TAGS]), st.text(max_size=3))).map(
    "".join
)
TEXT = st.one_of(
    st.sampled_from(KEYS + TAGS), st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
)
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT)
NESTED = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=4)),
    max_leaves=12,
)


@st.composite
def spoilt(draw):
    """A valid recipe with a few values replaced by arbitrary ones, or keys added."""
    plain = copy.deepcopy(VALID)
    for _ in range(draw(st.integers(1, 3))):
        section = plain
        while True:
            key = (
                draw(st.one_of(st.sampled_from(sorted(section)), TEXT))
                if isinstance(section, dict) and section
                else None
            )
            if key is None:
                break
            if isinstance(section.get(key), dict) and draw(st.booleans()):
                section = section[key]
                continue
            section[key] = draw(NESTED)
            break
    return plain


OVERRIDE = st.one_of(
    st.text(),
    YAML_LIKE,
    st.tuples(
        st.lists(st.one_of(st.sampled_from(KEYS), TEXT), min_size=1, max_size=3).map(".".join),
        st.one_of(YAML_LIKE, TEXT),
    ).map("=".join),
)


def faults(path, overrides):
    try:
        assert isinstance(Recipe.load(path, overrides), Recipe)
    except RecipeError as error:
        return error.faults
    return None


def check(recipe_file, content, overrides=()):
    path = recipe_file(content)
    found = faults(path, overrides)
    if found is not None:
        assert found
        assert all(fault.isprintable() for fault in found)
        lines = [
            int(fault.split(":")[1])
            for fault in found
            if fault.startswith(f"{path}:") and fault.split(":")[1].isdigit()
        ]
        assert lines == sorted(lines)


CASES = {
    "bytes": st.tuples(st.binary(), st.just([])),
    "text": st.tuples(st.text(), st.just([])),
    "yaml": st.tuples(YAML_LIKE, st.just([])),
    "structure": st.tuples(NESTED.map(write), st.just([])),
    "spoilt": st.tuples(spoilt().map(write), st.just([])),
    "overrides": st.tuples(st.just(write(VALID)), st.lists(OVERRIDE, max_size=3)),
    "both": st.tuples(spoilt().map(write), st.lists(OVERRIDE, max_size=3)),
}


@pytest.mark.parametrize("kind", CASES)
def test_every_input_gives_a_recipe_or_a_recipe_error(kind, recipe_file):
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(CASES[kind])
    def holds(case):
        check(recipe_file, *case)

    holds()


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_more_inputs_give_a_recipe_or_a_recipe_error(kind, recipe_file):
    @settings(max_examples=700, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(CASES[kind])
    def holds(case):
        check(recipe_file, *case)

    holds()
