"""A run directory records its format, and other formats are refused."""

import json
import re

import pytest

from fedmerge_peft import RunError, load_run
from fedmerge_peft.runs.formats import FORMAT
from fedmerge_peft.util import checked


@pytest.mark.parametrize(
    ("document", "version"),
    [({}, "1"), ({"format": 1}, "1"), ({"format": 2}, "2")],
)
def test_a_run_of_a_version_without_sums_is_refused_in_one_sentence(write_run, document, version):
    path = write_run("a", [], [[0.1], [0.2]])
    (path / "environment.json").write_text(json.dumps(document))
    with pytest.raises(RunError, match=rf"^{re.escape(str(path))} has run format {version}, but"):
        load_run(path)


@pytest.mark.parametrize(("document", "version"), [({}, "None"), ({"format": 9}, "9")])
def test_another_format_is_refused_in_one_sentence(write_run, document, version):
    path = write_run("a", [], [[0.1], [0.2]])
    checked.write_document(path / "environment.json", document)
    text = (
        f"{path} has run format {version}, but this version of fedmerge-peft reads format "
        f"{FORMAT}: run its recipe again, or read it with the version that wrote it"
    )
    with pytest.raises(RunError, match=f"^{re.escape(text)}$"):
        load_run(path)


def test_an_unreadable_environment_is_refused(write_run):
    path = write_run("a", [], [[0.1], [0.2]])
    (path / "environment.json").write_text("{")
    with pytest.raises(
        RunError, match=r"environment\.json is damaged: it does not end with its SHA-256 sum"
    ):
        load_run(path)


def test_a_start_that_was_interrupted_before_the_environment_was_written_is_accepted(write_run):
    path = write_run("a", [], [[0.1], [0.2]], finished=False)
    (path / "environment.json").unlink()
    assert load_run(path).environment == {}


def test_a_run_records_its_format(smoke, smoke_engine, tmp_path):
    from fedmerge_peft import federate

    run = federate(smoke("rounds=1"), tmp_path / "run", engine=smoke_engine)
    assert run.environment["format"] == FORMAT
