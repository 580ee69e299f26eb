"""Files: the same content gives the same bytes, and the mode follows from the umask."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedmerge_peft import AdapterLayout, AdapterSoup, Recipe
from fedmerge_peft.runs import checkpoint
from fedmerge_peft.strategies import make_strategy
from fedmerge_peft.strategies.base import StrategyContext
from fedmerge_peft.util import files
from fedmerge_peft.util.files import locked_directory, write_tensors, write_text


def write_all(folder):
    """A soup, a checkpoint and plain tensors."""
    folder, layout = (
        Path(folder),
        AdapterLayout.from_tensors([("a", (2, 3), "lora"), ("b", (4,), "head")]),
    )
    strategy = make_strategy(
        Recipe.load("smoke").strategy, StrategyContext(2, layout, lambda number: torch.ones(10))
    )
    rows = torch.arange(20.0).view(2, 10)
    AdapterSoup(rows, layout, {"c": torch.ones(2)}, {"d": torch.ones(2, 2)}).save(
        folder / "soup.safetensors"
    )
    checkpoint.write_soup(folder / "checkpoint", 1, strategy.soup)
    checkpoint.commit(folder / "checkpoint", 1, strategy, Recipe.load("smoke"), (100, ""))
    write_tensors(folder / "tensors.safetensors", {"a": rows, "b": rows[0] + 1})


def test_the_same_content_has_the_same_bytes(tmp_path):
    """The bytes do not depend on the process's hash seed."""
    for number in range(8):
        (tmp_path / str(number)).mkdir()
        write_all(tmp_path / str(number))
    (tmp_path / "elsewhere").mkdir()
    program = (
        f"import runpy; runpy.run_path({__file__!r})['write_all']({str(tmp_path / 'elsewhere')!r})"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
    first, *others = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")}
        for folder in sorted(tmp_path.iterdir())
    )
    assert len(first) == 4
    assert all(other == first for other in others)


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)], ids=oct)
def test_files_get_the_umasks_mode(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "tensors", {"a": torch.ones(2)})
        write_text(tmp_path / "text", "a")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"tensors": mode, "text": mode}


def test_a_locked_directory_stays_empty(tmp_path):
    with locked_directory(tmp_path / "run"), locked_directory(tmp_path / "run"):
        assert list((tmp_path / "run").iterdir()) == []
    assert list((tmp_path / "run").iterdir()) == []


def test_hard_links_leave_no_temporary_files(tmp_path):
    (tmp_path / "one").write_text("1")
    files.hardlink(tmp_path / "one", tmp_path / "two")
    files.hardlink(tmp_path / "one", tmp_path / "two")
    (tmp_path / "three").write_text("3")
    files.hardlink(tmp_path / "three", tmp_path / "two")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "one": "1",
        "two": "3",
        "three": "3",
    }
