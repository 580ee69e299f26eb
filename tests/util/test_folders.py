"""Folders with SHA-256 sums, also from somebody else."""

import os
from hashlib import sha256

import pytest

from fedmerge_peft.errors import RunError
from fedmerge_peft.util import folders
from fedmerge_peft.util.files import write_text
from fedmerge_peft.util.folders import SUMS, faults, whole_folder


@pytest.fixture
def export(tmp_path):
    """A folder with a file and its sum."""
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "a").write_text("content")
    folders.write_sums(folder)
    assert faults(folder) == []
    return folder


def add_line(folder, name, digest="0" * 64):
    with (folder / SUMS).open("a") as file:
        file.write(f"{digest}  {name}\n")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_special_files_are_reported_and_not_opened(export):
    """A named pipe without a writer would be read for ever."""
    os.mkfifo(export / "pipe")
    (export / "inner").mkdir()
    os.mkfifo(export / "inner" / SUMS)
    add_line(export, "pipe")
    add_line(export, f"inner/{SUMS}")
    assert faults(export) == [
        f"{export / 'inner' / SUMS} is not a regular file",
        f"{export / 'pipe'} is not a regular file",
    ]


def test_names_outside_the_folder_are_reported_and_not_opened(export, tmp_path, monkeypatch):
    (tmp_path / "secret").write_text("mine")
    add_line(export, "../secret", sha256(b"mine").hexdigest())
    add_line(export, "/etc/hostname")
    opened = []
    digest = folders._digest
    monkeypatch.setattr(folders, "_digest", lambda path: opened.append(path) or digest(path))
    assert len(faults(export)) == 2
    assert opened == [export / "a"]


def test_folders_with_sums_inside_folders_with_sums_are_read(tmp_path):
    places = [tmp_path]
    for _ in range(5):
        places.append(places[-1] / "d")
    places[-1].mkdir(parents=True)
    for place in reversed(places):
        folders.write_sums(place)
    assert faults(tmp_path) == []
    (places[-1] / "more").write_text("")
    assert faults(tmp_path) == [f"{places[-1] / 'more'} is not listed in {places[-1] / SUMS}"]


@pytest.mark.parametrize(
    "write", [lambda path: write_text(path, ""), lambda path: path.write_text("")]
)
def test_a_failed_write_names_the_folder_and_not_the_temporary_one(write, tmp_path):
    folder = tmp_path / "export"
    message = rf"^{folder}(/a/b)? cannot be written"
    with pytest.raises(RunError, match=message) as raised, whole_folder(folder) as partial:
        write(partial / "a" / "b")
    assert ".partial" not in str(raised.value)
    assert not [*tmp_path.iterdir()]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="needs a plain user")
def test_a_file_that_cannot_be_read_is_reported(export):
    (export / "a").chmod(0)
    assert faults(export) == [f"{export / 'a'} cannot be read"]
