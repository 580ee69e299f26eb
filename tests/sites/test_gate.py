"""Messages are admitted by their connection, and a site executes only what its job needs."""

import json
from types import SimpleNamespace
from uuid import uuid4

import pytest
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, MessageType
from nvflare.fuel.f3.streaming.stream_const import (
    STREAM_CHANNEL,
    STREAM_DATA_TOPIC,
    StreamHeaderKey,
)
from nvflare.private.admin_defs import Message
from nvflare.private.defs import RequestHeader
from nvflare.private.fed.client.client_req_processors import ClientRequestProcessors

from fedmerge_peft.sites.config import OPERATOR, SOCKETS_VARIABLE
from fedmerge_peft.sites.flare.gate import Peer, refusal
from fedmerge_peft.sites.flare.local_sockets import SCHEME, UnixDriver
from fedmerge_peft.sites.flare.site_requests import Deploy, is_job_id, restrict_requests

ADMIN = ("admin", "admin")
GET_TASK = ("server_command", "get_task")
SERVER = Peer("server", local=False)
OPERATORS_CELL = f"_admin_{uuid4()}"


def headers(origin, destination, request=ADMIN, kind=MessageType.REQ, **others):
    channel, topic = request
    return {
        MessageHeaderKey.ORIGIN: origin,
        MessageHeaderKey.DESTINATION: destination,
        MessageHeaderKey.MSG_TYPE: kind,
        MessageHeaderKey.CHANNEL: channel,
        MessageHeaderKey.TOPIC: topic,
        **others,
    }


def stream(origin, destination, request):
    channel, topic = request
    inner = {StreamHeaderKey.CHANNEL: channel, StreamHeaderKey.TOPIC: topic}
    return headers(origin, destination, (STREAM_CHANNEL, STREAM_DATA_TOPIC)) | inner


def remote(name, endpoint=None):
    return Peer(endpoint or name, local=False, certificate=name)


ADMITTED = {
    "the server administers a site": ("a", SERVER, headers("server", "a")),
    "a job tells its site how it is": (
        "a",
        Peer("a.J", local=True),
        headers("a.J", "a", ("admin", "train.notify_job_status")),
    ),
    "a site aborts its job": (
        "a.J",
        Peer("a", local=True),
        headers("a", "a.J", ("client_command", "abort")),
    ),
    "the server ends a run": (
        "a.J",
        SERVER,
        stream("server.J", "a.J", ("aux_communication", "__end_run__")),
    ),
    "the same, through the site": (
        "a.J",
        Peer("a", local=True),
        stream("server.J", "a.J", ("aux_communication", "__end_run__")),
    ),
    "a reply to a job through its site": (
        "a",
        SERVER,
        stream("server.J", "a.J", ("return_only", "x:y")),
    ),
    "a job fetches a task through its site": (
        "a",
        Peer("a.J", local=True),
        stream("a.J", "server.J", GET_TASK),
    ),
    "the server replies": ("a.J", SERVER, stream("server.J", "a.J", ("return_only", "x:y"))),
    "a site fetches a task": ("server", remote("a", "a.J"), stream("a.J", "server.J", GET_TASK)),
    "the operator sends a command": (
        "server",
        remote(OPERATOR, OPERATORS_CELL),
        stream(OPERATORS_CELL, "server", ("hci_channel", "command")),
    ),
}
REFUSED = {
    "another site, passed on by the server": ("a", SERVER, headers("b", "a")),
    "another site, under the server's name": ("server", remote("b"), headers("server", "a")),
    "another site, to a site": ("server", remote("b"), headers("b", "a")),
    "another site, in the name of a third": (
        "server",
        remote("b"),
        stream("a.J", "server.J", GET_TASK),
    ),
    "a site as the operator": (
        "server",
        remote("b", OPERATORS_CELL),
        stream(OPERATORS_CELL, "server", ("hci_channel", "command")),
    ),
    "a site with a command to the job": (
        "server",
        remote("b"),
        stream("b", "server.J", ("server_command", "app_command")),
    ),
    "a site with requests in a bulk": (
        "server",
        remote("b"),
        headers("b", "server", ("cellnet.channel", "bulk")),
    ),
    "the server, to a job through its site": (
        "a",
        SERVER,
        headers("server", "a.J", ("client_command", "abort")),
    ),
    "the server, passed on to a job": (
        "a.J",
        Peer("a", local=True),
        headers("server", "a.J", ("client_command", "abort")),
    ),
    "a job to another site": ("a", Peer("a.J", local=True), stream("a.J", "b", GET_TASK)),
    "a message of no known type": ("a", SERVER, headers("server", "a", ("x", "y"), kind="z")),
    "a message for another process": ("a", SERVER, headers("server", "b")),
    "a reply of another site": ("a", SERVER, headers("b", "a", kind=MessageType.REPLY)),
    "the server's request for a connection elsewhere": (
        "a",
        SERVER,
        headers("server", "a", **{MessageHeaderKey.CONN_URL: "tcp://10.0.0.1:1"}),
    ),
    "the server, to the network's agent": (
        "a",
        SERVER,
        headers("server", "a", ("_net_manager", "stop_cell")),
    ),
    "the server, to a job's logs": (
        "a.J",
        SERVER,
        headers("server", "a.J", ("client_command", "configure_job_log")),
    ),
    "the server, to a job's logs, in a stream": (
        "a.J",
        SERVER,
        stream("server", "a.J", ("client_command", "configure_job_log")),
    ),
    "the server, with events": (
        "a.J",
        SERVER,
        stream("server", "a.J", ("aux_communication", "fed.event")),
    ),
    "the server, in a bulk": ("a", SERVER, headers("server", "a", ("cellnet.channel", "bulk"))),
    "a local process that is not a job of the site": (
        "a",
        Peer("server", local=True),
        headers("server", "a"),
    ),
    "a local process under the server's name": (
        "a",
        Peer("a.J", local=True),
        headers("server", "a"),
    ),
    "a job that administers its site": ("a", Peer("a.J", local=True), headers("a.J", "a")),
    "a message without headers": ("a", SERVER, {}),
}


@pytest.mark.parametrize("case", ADMITTED.values(), ids=ADMITTED)
def test_the_gate_admits_what_a_job_needs(case):
    assert refusal(*case) is None


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_the_gate_refuses_everything_else(case):
    assert refusal(*case) is not None


def test_a_site_executes_only_what_a_job_needs(monkeypatch):
    monkeypatch.setattr(ClientRequestProcessors, "request_processors", [])
    restrict_requests()
    processors = ClientRequestProcessors.request_processors
    assert sorted(topic for one in processors for topic in one.get_topics()) == [
        "scheduler.cancel_resource",
        "scheduler.check_resource",
        "train.abort",
        "train.check_status",
        "train.deploy",
        "train.notify_job_status",
        "train.shutdown",
        "train.start_job",
    ]
    for processor in processors:
        for topic in processor.get_topics():
            request = Message(topic, {})
            request.set_header(RequestHeader.JOB_ID, "../../elsewhere")
            assert processor.process(request, None).body == "the job's id is not a UUID"


@pytest.mark.parametrize(
    "job", ["..", "a b", "", "x" * 36, None, 5, "0b0c6e1a-5a55-4c0e-9a68-9f2f1d3c7b11 --set x"]
)
def test_only_a_uuid_names_a_job(job):
    assert not is_job_id(job)
    assert is_job_id(str(uuid4()))


def test_a_site_runs_its_own_job_whatever_the_server_deploys(tmp_path):
    from fedmerge_peft.sites.flare.names import EXECUTOR

    (tmp_path / "startup").mkdir()
    (tmp_path / "local").mkdir()
    job = str(uuid4())
    request = Message("train.deploy", b"PK\x03\x04 not even a zip file")
    request.set_header(RequestHeader.JOB_ID, job)
    request.set_header(
        RequestHeader.JOB_META,
        {"job_id": job, "launcher_spec": {"a": {"docker": {}}}, "byoc": True, "scope": "x"},
    )
    engine = SimpleNamespace(
        args=SimpleNamespace(workspace=str(tmp_path)), get_client_name=lambda: "a"
    )
    assert Deploy().process(request, engine).body == "deployed fedmerge"
    files = sorted(path for path in (tmp_path / job).rglob("*") if path.is_file())
    assert [path.name for path in files] == [
        "config_fed_client.json",
        "fl_app.txt",
        "meta.json",
    ]
    config = json.loads(files[0].read_text())
    assert [entry["executor"]["path"] for entry in config["executors"]] == [EXECUTOR]
    assert json.loads(files[2].read_text()) == {"job_id": job, "name": "fedmerge"}


def test_sockets_need_a_folder_that_is_the_users_alone(tmp_path, monkeypatch):
    monkeypatch.setenv(SOCKETS_VARIABLE, str(tmp_path))
    tmp_path.chmod(0o755)
    with pytest.raises(PermissionError, match="0700"):
        UnixDriver.get_urls(SCHEME, {})
    tmp_path.chmod(0o700)
    first, second = UnixDriver.get_urls(SCHEME, {})
    assert first == second
    assert first.startswith(f"unix://local{tmp_path}/")
