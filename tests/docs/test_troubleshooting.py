"""Every message in docs/troubleshooting.md is the message of the command above it."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from fedmerge_peft import Recipe, federate
from fedmerge_peft.cli import main
from fedmerge_peft.util import checked

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
SHOWN = re.findall(r"^```text\n\$ (.*?)\n(.*?)\n```$", PAGE.read_text("utf-8"), re.DOTALL | re.M)
TICKETS = """
name: tickets
rounds: 1
task: {name: sequence-classification, label: queue}
backbone: {model: "tiny:bert"}
lora: {r: 2, target_modules: [query]}
data: {path: tickets.csv, partition: {scheme: natural, by: office}}
training: {learning_rate: 0.01, device: cpu}
"""
TYPOS = """name: tickets
rounds: 6
task:
  name: sequence-classification
  lable: queue
backbone:
  model: tiny:bert
data:
  path: tickets.csv
  partition: {scheme: natural, by: office}
training:
  lerning_rate: 0.005
"""
HEAD = "office,text,queue\n"
FILES = {
    "tickets.yaml": TICKETS,
    "typos.yaml": TYPOS,
    "tickets.csv": HEAD + "North,One.,a\nNorth,Two.,b\nSouth,Three.,a\nSouth,Four.,b\n" * 4,
    "semicolons.csv": "office;text;queue\nNorth;One.;a\n",
    "commas.csv": HEAD + "North,One, two.,a\n",
    "gaps.csv": HEAD + "North,,a\nNorth,Two.,b\n" * 4,
    "same.csv": HEAD + "North,One.,a\nNorth,Two.,a\n" * 3,
    "violet.csv": "queue,text\nviolet,One.\nblue,Two.\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files and runs that the page's commands name."""
    folder = tmp_path_factory.mktemp("symptoms")
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "latin.csv").write_bytes((HEAD + "North,Größe,a\n").encode("cp1252"))
    small = ["training.device=cpu", "baselines=[]", "rounds=1", "data.max_train=6"]
    federate(Recipe.load("smoke", small), folder / "runs" / "first")
    federate(Recipe.load("smoke", [*small, "strategy=fedavg"]), folder / "runs" / "fedavg")
    shutil.copytree(folder / "runs" / "first", folder / "runs" / "edited")
    shutil.copytree(folder / "runs" / "first", folder / "runs" / "changed")
    checked.write_document(folder / "runs" / "changed" / "examples.json", {"digest": "of others"})
    with (folder / "runs" / "edited" / "recipe.yaml").open("a") as file:
        file.write("# edited\n")
    return folder


def test_the_page_shows_messages():
    text = PAGE.read_text(encoding="utf-8")
    assert len(SHOWN) == text.count("```text") >= 20


@pytest.mark.parametrize(("command", "message"), SHOWN, ids=[command for command, _ in SHOWN])
def test_a_command_ends_with_the_message_shown(folder, monkeypatch, capsys, command, message):
    monkeypatch.chdir(folder)
    if "device=cuda" in command:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        main(shlex.split(command)[1:])
    assert stopped.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    pattern = ".*".join(re.escape(part.strip()) for part in " ".join(message.split()).split("..."))
    assert re.search(pattern, said), said
