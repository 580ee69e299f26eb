"""The YAML of recipes: accepted and refused documents."""

import time

import pytest

from fedmerge_peft.recipe import Recipe
from fedmerge_peft.recipe.yaml_document import Mark, parse


def read(text):
    document = parse(text, Mark("a.yaml", 1))
    assert not document.faults
    return document.value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        (".5", 0.5),
        ("1.", 1.0),
        ("+2", 2),
        ("-3", -3),
        ("0x1F", 31),
        ("0o17", 15),
        ("9223372036854775807", 2**63 - 1),
        ("-.inf", float("-inf")),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2026-01-01", "2026-01-01"),
        ("<<", "<<"),
        ("=", "="),
        ("'1'", "1"),
        ("!!str 1", "1"),
        ("!!float 1", 1.0),
        ("[a, 1, {b: no}]", ["a", 1, {"b": "no"}]),
        ("{1: a, null: b, true: c}", {"1": "a", "null": "b", "true": "c"}),
    ],
)
def test_scalars_follow_the_core_schema_of_yaml_1_2(text, value):
    assert read(text) == value
    assert type(read(text)) is type(value)


def test_nan_is_read_and_left_to_the_schema():
    assert read(".nan") != read(".nan")


def test_1e_4_is_a_number_and_no_is_text(minimal, recipe_file):
    recipe = Recipe.load(
        recipe_file(minimal + "training: {learning_rate: 1e-4, mixed_precision: no}\n")
    )
    assert recipe.training.learning_rate == 0.0001
    assert recipe.training.mixed_precision == "no"


def test_yaml_1_1_words_are_truth_values_where_the_schema_expects_one(minimal, recipe_file):
    assert (
        Recipe.load(recipe_file(minimal + "evaluation: {finetuned: no}\n")).evaluation.finetuned
        is False
    )


def test_a_duplicate_key_is_refused_with_both_lines(minimal, faults):
    assert faults(minimal + "seed: 2\n") == [
        "recipe.yaml:11: seed: given twice, first at recipe.yaml:2; keep one of them"
    ]


def test_a_nested_duplicate_key_is_listed_beside_other_errors(minimal, faults):
    found = faults(minimal + "lora:\n  r: 4\n  rank: 3\n  r: 8\n")
    assert [fault.split(": ")[:2] for fault in found] == [
        ["recipe.yaml:13", "lora.rank"],
        ["recipe.yaml:14", "lora.r"],
    ]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("", "recipe.yaml: is empty; set at least name, task, backbone and data"),
        (
            "# a comment alone\n",
            "recipe.yaml: is empty; set at least name, task, backbone and data",
        ),
        ("- a\n", "recipe.yaml:1: found a list, expected lines of key: value at the top level"),
        (
            "\nhello\n",
            "recipe.yaml:1: found text 'hello', expected lines of key: value at the top level",
        ),
        (
            "a: 1\n---\nb: 2\n",
            (
                "recipe.yaml:2: not valid YAML: expected a single document in the stream, "
                "but found another document"
            ),
        ),
        ("a: [1,\nb: }\n", "recipe.yaml:2: not valid YAML: "),
        ("a:\n\tb: 1\n", "indent with spaces, not tabs"),
        ("a: 1\nb: \x00\n", "recipe.yaml:2: not valid YAML: invalid character '\\\\x00'"),
        (
            b"a: 1\nb: \xff\n",
            "recipe.yaml:2: invalid UTF-8 (byte 0xff); save the file as UTF-8",
        ),
        ("a: 1\n".encode("utf-16"), "recipe.yaml:1: invalid UTF-8"),
        (
            'a: "\\UFFFFFFFF"\n',
            "recipe.yaml:1: not valid YAML: invalid escape or number",
        ),
        (
            "a: 1\nb: &x 1\nc: *x\n",
            "recipe.yaml:2: not valid YAML: anchors (&) and aliases (*) are not supported",
        ),
        (
            "a: *.query\n",
            "recipe.yaml:1: not valid YAML: anchors (&) and aliases (*) are not supported",
        ),
        (
            "%YAML 3.0\n---\na: 1\n",
            "recipe.yaml:1: not valid YAML: found incompatible YAML document",
        ),
        ("[" * 50_000, "recipe.yaml:1: not valid YAML: nested more than 32 levels deep"),
        (
            "".join(" " * i + "a:\n" for i in range(600)),
            "recipe.yaml:32: not valid YAML: nested more than 32 levels deep",
        ),
        (b"a" * 300_000, "recipe.yaml: exceeds the limit of 256 KiB"),
    ],
    ids=map(str, range(17)),
)
def test_text_that_is_not_one_mapping_is_refused_in_one_line(content, fault, faults):
    (found,) = faults(content)
    assert fault.replace("\\\\", "\\") in found


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("rounds: 123456789012345678901234567890", "rounds: the number does not fit into 64 bits"),
        (
            "rounds: 017",
            "rounds: 017 begins with a zero; leave it out, or quote the value if it is text",
        ),
        ("rounds: !!int x", "rounds: 'x' does not match its tag !!int"),
        (
            "rounds: !!python/object:os.system 3",
            ("rounds: the tag !!python/object:os.system is not supported; remove it"),
        ),
        ("rounds: !mine 3", "rounds: the tag !mine is not supported; remove it"),
        (
            'strategy: "\\ud800"',
            "strategy: found the unpaired surrogate \\ud800, expected Unicode text",
        ),
        ("[a]: 3", "found a key that is not text; quote it"),
        (
            '"\\udc00": 3',
            "found a key with the unpaired surrogate \\udc00, expected Unicode text",
        ),
    ],
)
def test_values_that_no_recipe_can_hold_are_refused_once(line, fault, minimal, faults):
    assert faults(f"{minimal}{line}\n") == [f"recipe.yaml:11: {fault}"]


def test_nested_aliases_are_refused_quickly(faults):
    laughs = 'a: &a ["lol", "lol"]\n' + "".join(
        f"{c}: &{c} [*{b}, *{b}, *{b}, *{b}]\n" for b, c in zip("abcdefgh", "bcdefghi", strict=True)
    )
    start = time.perf_counter()
    assert len(faults(laughs)) == 1
    assert time.perf_counter() - start < 1


def test_a_file_of_thousands_of_errors_lists_some_of_them_quickly(minimal, faults):
    start = time.perf_counter()
    found = faults(minimal + "".join(f"key{i}: 1\n" for i in range(5000)))
    assert time.perf_counter() - start < 5
    assert len(found) == 51
    assert found[-1] == "... and more"


def test_a_byte_order_mark_is_accepted(minimal, recipe_file):
    assert Recipe.load(recipe_file(b"\xef\xbb\xbf" + minimal.encode())).name == "first"


def test_windows_line_endings_are_accepted(minimal, recipe_file, faults):
    assert Recipe.load(recipe_file(minimal.replace("\n", "\r\n"))).seed == 1
    assert faults((minimal + "sead: 1\n").replace("\n", "\r\n"))[0].startswith(
        "recipe.yaml:11: sead"
    )
