"""Names from somebody else's run are shown literally, in cards and notebooks."""

import json
import shutil

import pytest

from fedmerge_peft import Recipe, RecipeError, load_run
from fedmerge_peft.serving.export import export_client
from fedmerge_peft.serving.model_card import code_span
from fedmerge_peft.util import checked

NAMES = ["<script>alert(1)</script>", "\x1b[31mred\x07", "\u202eabc", "](javascript:alert(1))\n# a"]


@pytest.fixture
def renamed(finished, tmp_path):
    """``renamed(name)``: a run whose first client has this name, in all of its documents."""

    def rename(name):
        run = load_run(
            shutil.copytree(finished("sequence-classification").run.path, tmp_path / "run")
        )
        old = run.client_names[0]

        def changed(value):
            if isinstance(value, dict):
                return {name if key == old else key: changed(one) for key, one in value.items()}
            if isinstance(value, list):
                return [changed(one) for one in value]
            return name if value == old else value

        for file in ("clients.json", "summary.json"):
            path = run.path / file
            checked.write_document(path, changed(checked.read_document(path)))
        return load_run(run.path)

    return rename


@pytest.mark.parametrize("name", NAMES)
def test_names_of_clients_inject_no_markup_into_cards_and_notebooks(renamed, name, tmp_path):
    run = renamed(name)
    assert name in run.client_names
    card = (export_client(run, name, tmp_path / "export") / "README.md").read_text()
    body = card.partition("\n---\n")[2].partition("```")[0]
    page = run._repr_html_()
    for text in (card, page):
        assert all(line.isprintable() for line in text.split("\n"))
    assert "<script>" not in body + page
    assert "](javascript" not in body
    assert "\n# a" not in card


@pytest.mark.parametrize("key", ["model", "revision", "tokenizer", "gguf_file"])
@pytest.mark.parametrize("value", ["--trust-remote-code", "a\n# b", "a\x1b[2J", "a\u202e"])
def test_names_of_models_are_one_printable_line_and_not_options(key, value):
    """Exports put them into cards, code and the command of a server."""
    with pytest.raises(RecipeError, match=f"backbone.{key}: .*no hyphen at the beginning"):
        Recipe.load("smoke").replace([f"backbone.{key}={json.dumps(value)}"])


def test_backticks_do_not_end_a_span_of_code():
    assert code_span("org/model") == "`org/model`"
    assert code_span("a`b``](x)") == "``` a`b``](x) ```"
