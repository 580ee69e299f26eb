"""``fedmerge federate stop``: jobs end after a round or at once, and nothing is lost."""

from contextlib import contextmanager

import pytest

from fedmerge_peft.cli import main
from fedmerge_peft.errors import FederateError
from fedmerge_peft.sites.server.job import run_job
from fedmerge_peft.sites.server.transport import JobStopped
from fedmerge_peft.sites.wire import Message, kind_of
from sites.conftest import InProcessTransport

pytest.importorskip("nvflare")

from nvflare.apis.signal import Signal
from nvflare.fuel.flare_api.api_spec import InternalError, JobNotDone, JobNotRunning, NoConnection

from fedmerge_peft.sites.flare import operator, session
from fedmerge_peft.sites.flare.controller import FlareTransport


class FakeSession:
    """Server with one job, which goes one step further at each poll of its status.

    A job that was submitted starts, does not answer commands at first, and, once it was asked to
    stop, ends; after its end the server still lists it for two requests, as FLARE does.
    """

    def __init__(self, status="RUNNING", stuck=False):
        self.status, self.stuck = status, stuck
        self.asked, self.busy, self.down, self.refusals = [], 2, False, 0

    def get_system_info(self):
        class Info:
            job_info = []

        if self.status == "RUNNING":
            Info.job_info = [type("Job", (), {"job_id": "j"})]
        return Info

    def list_jobs(self):
        return [{"job_id": "old", "status": "RUNNING"}, {"job_id": "j", "status": self.status}]

    def get_job_meta(self, job):
        if self.status == "SUBMITTED":
            self.status = "RUNNING"
        elif self.asked and not self.stuck:
            self.status = "FINISHED:COMPLETED"
        return {"status": self.status}

    def do_app_command(self, job, topic, command):
        if self.status != "RUNNING":
            raise JobNotRunning("j")
        if self.busy:
            self.busy -= 1
            raise InternalError("the job is starting")
        self.asked.append(command["command"])
        return {"requested": "stopped"}

    def abort_job(self, job):
        self.asked.append("abort")

    def shutdown(self, target, wait):
        if self.status == "RUNNING" or self.refusals < 2:
            self.refusals += 1
            raise JobNotDone("job j is still running")
        self.down = True


@pytest.fixture
def stop(monkeypatch, tmp_path):
    """``stop(session, **options)``: return the lines that the operator sees."""

    def run(fake, **options):
        @contextmanager
        def opened(kit):
            yield fake

        class Prepared:
            deadline = 1

            @classmethod
            def read(cls, kit):
                return cls

        lines = []
        monkeypatch.setattr(operator, "open_session", opened)
        monkeypatch.setattr(operator, "FederationFile", Prepared)
        monkeypatch.setattr(operator, "_POLL_INTERVAL", 0.001)
        monkeypatch.setattr(operator, "_FETCH_TIME", 0.0)
        monkeypatch.setattr(operator, "_END_TIMEOUT", -0.9)
        operator.stop(tmp_path, lines.append, **{"now": False, "everything": False, **options})
        return lines

    return run


@pytest.mark.parametrize("status", ["SUBMITTED", "RUNNING"])
@pytest.mark.parametrize(("now", "command"), [(False, "stop"), (True, "abort")])
def test_the_server_is_shut_down_when_the_job_has_ended(stop, status, now, command):
    fake = FakeSession(status)
    assert stop(fake, everything=True, now=now) == [
        f"job j stops {'at once' if now else 'after this round'}",
        "server and sites shut down",
    ]
    assert fake.asked == [command]
    assert fake.down
    assert fake.refusals == 2


def test_without_a_job_the_server_is_shut_down_at_once(stop):
    fake = FakeSession("FINISHED:COMPLETED")
    assert stop(fake, everything=True) == ["no job is running", "server and sites shut down"]
    assert fake.asked == []


@pytest.mark.parametrize(
    ("now", "advice"),
    [
        (False, "Repeat the command, or add --now, which loses the current round"),
        (True, "Repeat the command"),
    ],
)
def test_a_job_that_does_not_end_in_time_is_one_error_and_nothing_is_shut_down(stop, now, advice):
    fake = FakeSession(stuck=True)
    with pytest.raises(FederateError) as error:
        stop(fake, everything=True, now=now)
    reason = "job j still runs; server and sites were not shut down"
    assert str(error.value) == f"{reason}. {advice}"
    assert not fake.down


def test_a_job_that_does_not_reply_is_an_error_that_mentions_no_shutdown_without_all(stop):
    fake = FakeSession()
    fake.busy = 10**9
    with pytest.raises(FederateError) as error:
        stop(fake)
    assert str(error.value) == (
        "job j does not reply. Repeat the command, or add --now, which loses the current round"
    )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (JobNotDone("job j is still running"), "refused a request: job j is still running"),
        (InternalError(""), "refused a request: InternalError"),
        (RuntimeError("status 7\nmore"), r"refused a request: RuntimeError: status 7;"),
        (NoConnection("gone"), r"stopped responding \(gone\)"),
    ],
)
def test_a_refused_request_is_one_error_with_exit_code_2(
    error, message, monkeypatch, tmp_path, capsys
):
    class Prepared:
        host, port, deadline = "localhost", 1, 1

        @classmethod
        def read(cls, kit):
            return cls

    class Refusing(FakeSession):
        def list_jobs(self):
            raise error

        def close(self):
            pass

    monkeypatch.setattr(session, "FederationFile", Prepared)
    monkeypatch.setattr(session, "new_secure_session", lambda *names, **options: Refusing())
    monkeypatch.setattr("fedmerge_peft.sites.prepare.find_kit", lambda directory, name: tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["federate", "stop", str(tmp_path), "--all"])
    assert stopped.value.code == 2
    output = capsys.readouterr().err
    assert len(output.splitlines()) == 1
    with pytest.raises(FederateError, match=message):
        raise FederateError(output)


class Aborted(InProcessTransport):
    """Transport of a job that is stopped at once when ``after`` clients have been trained."""

    after = 0

    def send_and_receive(self, requests, deadline):
        for reply in super().send_and_receive(requests, deadline):
            kinds = [kind_of(payload) for _, payload in self.sent]
            if kinds[-1] == "train" and kinds.count("train") == self.after:
                raise JobStopped
            yield reply


def test_a_round_that_is_stopped_at_once_has_no_effect(smoke, federation_of, connect):
    recipe = smoke("rounds=3", "clients.failures=skip")
    kit, trainers = federation_of(recipe, 2, name="stopped")
    whole, others = federation_of(recipe, 2, name="whole")
    transport = Aborted(trainers)
    transport.after = 6 + 2  # the second client of the second round
    outcome = run_job(kit, transport, lambda: None, lambda line: None)
    assert (outcome.state, outcome.error, outcome.rounds) == ("stopped", None, 1)
    run_job(kit, connect(trainers), lambda: None, lambda line: None)
    run_job(whole, connect(others), lambda: None, lambda line: None)
    soups = [(folder / "run" / "soup.safetensors").read_bytes() for folder in (kit, whole)]
    assert soups[0] == soups[1]


def test_replies_after_an_abort_are_not_passed_on():
    class FakeController:
        def send(self, task, fl_ctx, targets):
            abort.trigger(True)
            task.task_done_cb(task, fl_ctx)

        def cancel_task(self, task, fl_ctx):
            pass

    abort = Signal()
    transport = FlareTransport(FakeController(), None, abort, ["north"])
    with pytest.raises(JobStopped):
        list(transport.send_and_receive({"north": [(0, Message("train").to_bytes)]}, 10))
