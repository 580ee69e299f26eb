"""The embedded chats of eight organizations."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

from fedmerge_peft import Recipe
from fedmerge_peft.data import federate_data

TOOL = Path(__file__).parents[2] / "tools" / "assistants.py"
RULES = runpy.run_path(str(TOOL.with_name("answers.py")))["RULES"]


def test_the_file_is_what_the_program_writes():
    made = runpy.run_path(str(TOOL))
    held = made["OUT"] if made["OUT"].is_absolute() else TOOL.parents[1] / made["OUT"]
    rows = [json.loads(line) for line in held.read_text(encoding="utf-8").splitlines()]
    assert rows == made["chats"]()
    assert len(rows) == 408


def test_assistants_of_a_group_answer_by_its_rule():
    recipe = Recipe.load("assistants")
    data = federate_data(recipe.data, None, recipe.seed)
    assert len(data.clients) == 8
    for row in data.table:
        messages = row["messages"]
        assert [each["role"] for each in messages] == ["user", "assistant"] * (len(messages) // 2)
        for answer in messages[1::2]:
            assert re.fullmatch(RULES[row["rule"]], answer["content"])
        assert not any("{" in each["content"] for each in messages)
