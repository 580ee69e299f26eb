"""``fedmerge federate run`` waits for sites: it says for which ones, and gives up if asked to."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from fedmerge_peft.cli import main
from fedmerge_peft.sites.config import FederationFile

pytest.importorskip("nvflare")

from fedmerge_peft.sites.flare import operator


class Clock:
    """Time that passes only while the operator sleeps."""

    now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def run(monkeypatch, tmp_path):
    """``run(connected, *options)``: run a federation of three sites; return the exit code.

    ``connected`` is a function from seconds to the names of the connected sites.
    """

    def run(connected, *options):
        clock = Clock()
        server = SimpleNamespace(server_info=SimpleNamespace(start_time=0), job_info=[])
        session = SimpleNamespace(
            get_system_info=lambda: server,
            get_connected_client_list=lambda: [
                SimpleNamespace(name=name) for name in connected(clock.now)
            ],
            submit_job=lambda folder: "j",
        )

        @contextmanager
        def opened(kit):
            yield session

        def followed(*_):
            raise SystemExit(f"started after {clock.now:.0f} s")

        (tmp_path / "startup").mkdir()
        sites = {name: [name] for name in ("a", "b", "c")}
        FederationFile(project="p", host="h", port=1, sites=sites).write(tmp_path)
        monkeypatch.setattr(operator, "open_session", opened)
        monkeypatch.setattr(operator, "time", clock)
        monkeypatch.setattr(operator, "_follow_job", followed)
        with pytest.raises(SystemExit) as ended:
            main(["federate", "run", str(tmp_path), *map(str, options)])
        return ended.value.code

    return run


def test_each_minute_the_connected_and_missing_sites_are_reported(run, capsys):
    def connected(seconds):
        return "abc" if seconds > 200 else "a"

    code = run(connected, "--wait", 100, "--min-sites", 2)
    assert code == "started after 200 s"
    assert capsys.readouterr().out.splitlines() == [
        "1 of 3 sites connected, and a job starts with 3; waiting for b, c",
        "1 of 3 sites connected, and a job starts with 3; waiting for b, c",
        *["1 of 3 sites connected, and a job starts with 2; waiting for b, c"] * 2,
    ]


def test_a_run_gives_up_if_too_few_sites_connect(run, capsys):
    code = run(lambda _: "a", "--wait", 10, "--min-sites", 2, "--connect-timeout", 600)
    assert code == 2
    assert "1 of 3 sites connected after 600 s, and a job needs 2; start" in capsys.readouterr().err


@pytest.mark.parametrize("wait", [30, 900])
def test_a_run_with_enough_sites_does_not_give_up(run, wait):
    options = ("--wait", wait, "--min-sites", 2, "--connect-timeout", 60)
    assert run(lambda _: "ab", *options) == f"started after {wait} s"
