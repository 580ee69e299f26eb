"""An export that is killed at any file operation is whole or absent, and can be repeated."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedmerge_peft.runs.cleanup import files_in
from fedmerge_peft.util.folders import faults

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def export(finished):
    """``export(kind, folder, kill)``: return the exit code and the number of file operations."""
    path = finished("sequence-classification").run.path
    program = [sys.executable, str(Path(__file__).with_name("killable.py")), str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )

    def ask(kind, folder, kill=0):
        process.stdin.write(json.dumps({"kind": kind, "folder": str(folder), "kill": kill}) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield ask
    process.stdin.close()
    process.stdout.close()
    assert process.wait(30) == 0


def content(folder):
    """The files of an export, without the example in the cards, which names the folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in files_in(folder)
        if path.name not in ("README.md", "SHA256SUMS")
    }


@pytest.mark.parametrize("kind", ["client", "all", "soup"])
def test_a_killed_export_is_whole_or_absent_and_can_be_repeated(export, tmp_path, kind):
    whole = tmp_path / "whole" / "export"
    whole.parent.mkdir()
    code, operations = export(kind, whole)
    assert code == 0
    assert operations > 20
    some = range(1, operations, max(1, operations // 12))
    last = range(operations - 5, operations + 1)  # the sums, and the rename
    for number in sorted({*some, *last}):
        folder = tmp_path / str(number) / "export"
        folder.parent.mkdir()
        if number % 2:
            folder.mkdir()  # an empty folder may be there before
        code, _ = export(kind, folder, number)
        assert code == -signal.SIGKILL
        absent = not folder.exists() or not any(folder.iterdir())
        assert absent or faults(folder) == [], number
        if absent:
            assert export(kind, folder)[0] == 0, number
        assert faults(folder) == []
        assert content(folder) == content(whole)
        assert [path.name for path in folder.parent.iterdir()] == ["export"]
