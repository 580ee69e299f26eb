"""Regular expressions of recipes match any name in a moment, or are refused with the line."""

import re
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmerge_peft.recipe.patterns import pattern_fault

NAME = "base_model.model.encoder.layers.10.self_attention.query_aaaaaaaa"

USUAL = [
    "all-linear",
    r".*\.(q|k|v|o|gate|up|down)_proj",
    r"model\.layers\.([0-9]|1[0-9])\.(self_attn|mlp)\..*_proj",
    r"^(?!.*visual)(?!.*lm_head).*(?:q_proj|k_proj|v_proj)$",
    r"(.*\.)?layers?\.\d+\.attn\.\w+",
    r"layer\.0.*query",
    r".*layers.*attn.*query.*",
    r"(?:encoder|decoder)\.block\.\d{1,2}\.layer\.[01]\.(SelfAttention|EncDecAttention)\.(q|v)",
]
ENDLESS = [
    r"(a+)+$",
    r"(a|aa)+$",
    r"(.*)*x",
    r"(a?a?)*x",
    r"(\w+\s?)*!",
    r"(a{1,50}){1,50}x",
    r".*.*.*.*.*[!]",
    r"(?=(a+)+x).*",
    r"(?:(?:a|b|ab)*)*x",
    r"(a*){2,50}x",
]


@pytest.mark.parametrize("pattern", USUAL)
def test_usual_patterns_are_accepted(pattern):
    assert pattern_fault(pattern) is None


@pytest.mark.parametrize("pattern", ENDLESS)
@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern"])
def test_patterns_that_may_take_forever_are_refused(pattern, key, minimal, faults):
    value = f"{{'{pattern}': 4}}" if key == "rank_pattern" else f"'{pattern}'"
    (found,) = faults(f"{minimal}lora:\n  {key}: {value}\n")
    assert found.startswith(f"recipe.yaml:12: lora.{key}: ")
    assert "may take forever" in found


@pytest.mark.parametrize("pattern", ["(", "a**", "[", "(?P<1>a)", "\\", "a{3,1}"])
def test_texts_that_are_no_patterns_are_refused(pattern):
    assert "is not a regular expression" in pattern_fault(pattern)


PARTS = st.sampled_from([*"aeq.|()*+?[]{}", "a", ".*", "(a|q)", "(?:", "{1,9}", r"\w+", "(?!", "^"])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(st.lists(PARTS, min_size=1, max_size=12).map("".join))
def test_accepted_patterns_end(pattern):
    if pattern_fault(pattern) is None:
        begun = time.process_time()
        re.fullmatch(pattern, NAME)
        re.match(rf"(.*\.)?({pattern})$", NAME + "!")
        assert time.process_time() - begun < 5
