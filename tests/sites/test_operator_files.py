"""A hostile server names no file, folder or function at the operator's machine."""

import json
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedmerge_peft.errors import WireError

pytest.importorskip("nvflare")

from nvflare.fuel.flare_api.api_spec import NoConnection
from nvflare.fuel.hci.client.file_transfer import FileTransferModule
from nvflare.fuel.hci.file_transfer_defs import PULL_FOLDER_FQN, PUSH_FOLDER_FQN
from nvflare.fuel.hci.reg import CommandSpec

from fedmerge_peft.sites.flare import operator_files

OUTCOME = {
    "state": "ended",
    "rounds": 2,
    "total": 2,
    "error": None,
    "absent": {"south": "it is not connected"},
    "adapters": {"a": None},
    "events": ["round 1", "round 2"],
}


class HostileServer:
    """Session with a server whose replies name a victim's files, and whose archive is given."""

    def __init__(self, victim, archive, **changes):
        self.archive, self.written, self.api = archive, [], self
        self.meta = {
            "files": [[str(victim / "workspace.zip"), "r1"], ["../../meta.json", "r2"]],
            "tx_id": "../../..",
            "source_fqcn": "server",
            "location": str(victim),
        } | changes

    def server_execute(self, command):
        return {"meta": self.meta}

    def download_file(self, source, reference, path):
        self.written.append(Path(path))
        Path(path).write_bytes(self.archive)


@pytest.fixture
def victim(tmp_path):
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "precious").write_text("mine")
    return folder


@pytest.fixture
def archive_of(tmp_path):
    """``archive_of(content, name)``: the bytes of a job's archive with this outcome."""

    def make(content, name="app_server/outcome.json"):
        path = tmp_path / "made.zip"
        with zipfile.ZipFile(path, "w") as files:
            files.writestr("log.txt", "")
            files.writestr(name, content)
        return path.read_bytes()

    return make


@pytest.mark.parametrize("name", ["app_server/outcome.json", "../../outcome.json"])
def test_a_hostile_server_neither_writes_nor_removes_files_of_the_operator(
    victim, archive_of, tmp_path, name
):
    session = HostileServer(victim, archive_of(json.dumps(OUTCOME), name))
    before = set(tmp_path.rglob("*"))
    assert operator_files.download_outcome(session, "job") == OUTCOME
    assert len(session.written) == 1
    assert not session.written[0].is_relative_to(tmp_path)
    assert not session.written[0].exists()
    assert (victim / "precious").read_text() == "mine"
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"{}",
        b"\xff",
        b"[" * 100_000,
        json.dumps(OUTCOME | {"state": "else"}).encode(),
        json.dumps(OUTCOME | {"rounds": 10**400}).encode(),
        json.dumps(OUTCOME | {"rounds": -1}).encode(),
        json.dumps(OUTCOME | {"events": [1]}).encode(),
        json.dumps(OUTCOME | {"more": 1}).encode(),
        b" " * (2**24 + 1),
    ],
)
def test_an_outcome_of_another_form_is_one_error(victim, archive_of, content):
    with pytest.raises(WireError):
        operator_files.download_outcome(HostileServer(victim, archive_of(content)), "job")


@pytest.mark.parametrize(
    "changes",
    [{"files": None}, {"files": [1]}, {"files": [["workspace.zip"]]}, {"files": [[2, "r"]]}],
)
def test_a_reply_of_another_form_is_one_error(victim, archive_of, changes):
    session = HostileServer(victim, archive_of(json.dumps(OUTCOME)), **changes)
    with pytest.raises(WireError, match="are missing or not readable"):
        operator_files.download_outcome(session, "job")


def test_an_archive_that_is_none_is_one_error_and_a_job_may_leave_no_outcome(victim, archive_of):
    with pytest.raises(WireError, match="BadZipFile"):
        operator_files.download_outcome(HostileServer(victim, b"PK"), "job")
    assert operator_files.download_outcome(HostileServer(victim, b"", files=[]), "job") is None
    other = HostileServer(victim, archive_of("{}", "other.json"))
    assert operator_files.download_outcome(other, "job") is None


@pytest.mark.parametrize("reply", [None, [], {"events": 1}, {"events": [1]}, {"other": 1}])
def test_a_status_of_another_form_is_one_error(reply):
    with pytest.raises(WireError, match="the job's status"):
        operator_files.read_status(reply)


@pytest.mark.parametrize("status", operator_files._LOST)
def test_a_lost_connection_is_no_malformed_reply(status):
    """Only then does the operator ask again."""
    api = SimpleNamespace(server_execute=lambda _: {"status": status})
    with pytest.raises(NoConnection):
        operator_files.download_outcome(SimpleNamespace(api=api), "job")


# ---- FLARE's functions for files -----------------------------------------------------------------
@pytest.fixture
def client(tmp_path, monkeypatch):
    """FLARE's module for files at the operator."""
    own = operator_files._for_any_command  # not restricted by another test
    monkeypatch.setattr(FileTransferModule, "generate_module_spec", own)
    return FileTransferModule(str(tmp_path), str(tmp_path))


def mapped(client, name, function):
    command = CommandSpec(name=name, description="", usage="", handler_func=None)
    command.client_cmd, command.scope_name = function, "job"
    return client.generate_module_spec(command)


def test_without_the_restriction_a_server_chooses_where_a_download_writes(client, tmp_path):
    """The attack: FLARE's own download joins the server's name to its folder."""
    written = []

    def execute(command, cmd_ctx):
        cmd_ctx.requester.send_request(api, None, cmd_ctx)
        return {"status": "stop here"}

    api = SimpleNamespace(
        server_execute=execute,
        download_file=lambda source, reference, path: written.append(path),
        fire_session_event=lambda *_: None,
    )
    context = SimpleNamespace(
        get_command_entry=lambda: None,
        get_api=lambda: api,
        get_command=lambda: "",
        set_requester=lambda requester: setattr(context, "requester", requester),
        set_command_result=lambda _: None,
    )
    victim = str(tmp_path / "victim" / ".bashrc")
    client.pull_binary_file(["pull_binary_file", "server", "t", "r", "job", victim], context)
    assert written == [victim]
    assert mapped(client, "download_job", PULL_FOLDER_FQN) is not None
    assert mapped(client, "get_job_meta", PUSH_FOLDER_FQN) is not None


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("download_job", PULL_FOLDER_FQN),
        ("submit_job", PULL_FOLDER_FQN),
        ("get_job_meta", PUSH_FOLDER_FQN),
        ("list_jobs", PUSH_FOLDER_FQN),
    ],
)
def test_a_server_maps_no_command_to_a_function_for_files(client, name, function):
    operator_files.restrict_file_commands()
    assert mapped(client, name, function) is None
    assert mapped(client, "submit_job", PUSH_FOLDER_FQN) is not None
