"""``fedmerge doctor`` reports the installation and fails for required parts only."""

import importlib.metadata

import huggingface_hub
import pytest

from fedmerge_peft.cli import installation, main


@pytest.fixture
def doctor(capsys):
    """Run the command; return its lines by subject, and the exit code."""

    def call():
        with pytest.raises(SystemExit) as stopped:
            main(["doctor"])
        lines = capsys.readouterr().out.splitlines()
        return {line[4:28].strip(): line for line in lines}, stopped.value.code or 0

    return call


def test_versions_devices_extras_hub_and_disk_are_checked(doctor):
    lines, _ = doctor()
    looked = {
        "Python",
        "fedmerge-peft",
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "CPU",
        "extra demo",
        "trackers",
        "hub",
        "disk here",
    }
    assert looked <= lines.keys()
    assert importlib.metadata.version("torch") in lines["torch"]


def test_every_extra_for_users_is_checked():
    extras = {
        check.name.removeprefix("extra ")
        for check in installation.run_checks()
        if check.name.startswith("extra ")
    }
    known = set(importlib.metadata.metadata("fedmerge-peft").get_all("Provides-Extra"))
    for_contributors = {"dev", "docs", "release"}
    assert extras == known - for_contributors - {"tensorboard"}  # which is among the trackers


def test_an_unreachable_hub_is_no_failure(monkeypatch):
    class Silent:
        def head(self, *_, **__):
            raise ConnectionError

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", Silent)
    check = installation._hub()
    assert (check.state, "does not respond (ConnectionError)" in check.result) == ("optional", True)


def test_a_token_is_never_shown(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    check = installation._hub()
    assert "token found" in check.result
    assert "hf_secret" not in f"{check}"


@pytest.mark.parametrize(
    ("needs", "state", "remedy"),
    [
        ("torch>=2", "ok", ""),
        ("torch>=99", "failed", "pip install -c constraints.txt 'torch>=99'"),
        ("no-such-package>=1", "failed", "pip install 'no-such-package>=1'"),
    ],
)
def test_an_unsupported_version_comes_with_the_command_that_updates_it(
    needs, state, remedy, monkeypatch
):
    monkeypatch.setattr(installation, "requires", lambda _: [needs, 'pytest>=99; extra == "dev"'])
    _, check = installation._packages()
    assert (check.state, check.remedy) == (state, remedy)


def test_a_failed_check_exits_with_code_1(doctor, monkeypatch):
    monkeypatch.setattr(installation, "requires", lambda _: ["torch>=99"])
    lines, code = doctor()
    assert code == 1
    assert lines["torch"].startswith("!!  torch")
