"""Gate that admits or refuses each message that reaches a process of NVIDIA FLARE.

FLARE passes a message to the handler that its headers name, and trusts the sender in the headers.
The gate decides before FLARE processes the message. For the gate, the sender is the other end of
the connection: the party that the certificate names, or a process of the same user behind a Unix
socket. No message is forwarded between sites. The table lists the requests that this package needs;
replies, goodbyes and acknowledgments of streams from the same senders also pass:

    process          admits
    site             from the server: administration (``site_requests``), and messages for its jobs
                     from its own job: the status of the job, and messages for the server
    job at a site    from the server, directly or through the site: replies, the end of the run
                     from its site: abort
    server           from sites: registration, heartbeats, tasks, failures of jobs
                     from the operator: registration, commands, files of jobs
                     from its own jobs: everything
    job at server    from the server's main process: everything that its gate has admitted
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nvflare.fuel.f3.cellnet.core_cell import CoreCell
from nvflare.fuel.f3.cellnet.defs import CellChannel, MessageHeaderKey, MessageType
from nvflare.fuel.f3.cellnet.fqcn import FQCN
from nvflare.fuel.f3.connection import Connection
from nvflare.fuel.f3.drivers.driver_params import DriverParams
from nvflare.fuel.f3.endpoint import Endpoint
from nvflare.fuel.f3.message import Message
from nvflare.fuel.f3.streaming.stream_const import (
    STREAM_ACK_TOPIC,
    STREAM_CHANNEL,
    STREAM_DATA_TOPIC,
    STREAM_ERROR_TOPIC,
    StreamHeaderKey,
)
from nvflare.fuel.utils.admin_name_utils import is_valid_admin_client_name

from fedmerge_peft.sites.config import OPERATOR
from fedmerge_peft.sites.flare.local_sockets import SCHEME
from fedmerge_peft.util.text import printable

log = logging.getLogger(__name__)

Request = tuple[str, str]
"""Channel and topic of a request; ``*`` for any topic."""

_GOODBYE: Request = (CellChannel.CELLNET, "bye")
_REPLIES: Request = (CellChannel.RETURN_ONLY, "*")
"""Replies that FLARE streams back to the process that sent the request."""
_STREAM_CONTROL = (STREAM_ACK_TOPIC, STREAM_ERROR_TOPIC)

SITE_FROM_SERVER: frozenset[Request] = frozenset({(CellChannel.CLIENT_MAIN, "admin"), _GOODBYE})
SITE_FROM_JOB: frozenset[Request] = frozenset(
    {(CellChannel.CLIENT_MAIN, "train.notify_job_status"), _GOODBYE}
)
JOB_FROM_SERVER: frozenset[Request] = frozenset(
    {(CellChannel.AUX_COMMUNICATION, "__end_run__"), _REPLIES, _GOODBYE}
)
JOB_FROM_SITE: frozenset[Request] = frozenset({(CellChannel.CLIENT_COMMAND, "abort"), _GOODBYE})
SERVER_FROM_SITE: frozenset[Request] = frozenset(
    {
        *((CellChannel.SERVER_MAIN, topic) for topic in ("challenge", "register", "quit")),
        *((CellChannel.SERVER_MAIN, topic) for topic in ("heart_beat", "report_job_failure")),
        *((CellChannel.SERVER_COMMAND, topic) for topic in ("get_task", "submit_update")),
        *(
            (CellChannel.AUX_COMMUNICATION, topic)
            for topic in ("__sync_runner__", "__task_check__", "__job_heartbeat__")
        ),
        _REPLIES,
        _GOODBYE,
    }
)
SERVER_FROM_OPERATOR: frozenset[Request] = frozenset(
    {
        *((CellChannel.SERVER_MAIN, topic) for topic in ("challenge", "register", "quit")),
        (CellChannel.HCI, "*"),
        (CellChannel.AUX_COMMUNICATION, "ObjectStreamer.Request"),
        (CellChannel.AUX_COMMUNICATION, "ObjectStreamer.Abort"),
        ("download_service__", "*"),
        _REPLIES,
        _GOODBYE,
    }
)


@dataclass(frozen=True)
class Peer:
    """The other end of a connection."""

    endpoint: str
    """Name that the peer uses in FLARE's network, such as ``site-1`` or ``site-1.JOB``."""
    local: bool
    """True for a process of the same user, connected by a Unix socket, and for this process."""
    certificate: str | None = None
    """Common name in the certificate of a peer that has connected to this process. None for a local
    peer, and for a server to which this process has connected: TLS checks its host name."""


def refusal(here: str, peer: Peer, headers: Mapping[str, Any]) -> str | None:
    """Return the reason why a process refuses a message; None if it admits the message.

    Args:
        here: Name of this process in FLARE's network: ``server``, ``site-1``, or one of these with
            the id of a job, as in ``site-1.JOB``.
        peer: The other end of the connection on which the message arrived.
        headers: The message's headers, which the sender may have chosen freely.
    """
    origin, destination = (
        str(headers.get(key, "")) for key in (MessageHeaderKey.ORIGIN, MessageHeaderKey.DESTINATION)
    )
    at_server = _root(here) == FQCN.ROOT_SERVER
    if headers.get(MessageHeaderKey.CONN_URL):
        return "it asks for a connection to another address"
    if peer.local:
        if _root(peer.endpoint) != _root(here):
            return f"{peer.endpoint} is not a process of this machine"
        if at_server:
            return None
        passed_on = _is_job(here) and _root(origin) == FQCN.ROOT_SERVER
        if _root(origin) != _root(here) and not passed_on:
            return f"it claims to come from {origin}"
        if destination != here:
            to_server = _root(destination) == FQCN.ROOT_SERVER
            return None if to_server else f"it is for {destination}"
        allowed = JOB_FROM_SITE if _is_job(here) else SITE_FROM_JOB
        if passed_on:
            allowed = JOB_FROM_SERVER
    elif at_server:
        operator = peer.certificate == OPERATOR
        name = peer.endpoint if operator else peer.certificate
        if operator != is_valid_admin_client_name(peer.endpoint):
            return f"{peer.certificate} must not act as {peer.endpoint}"
        if _root(origin) != name or _root(peer.endpoint) != name:
            return f"{name} has sent it as {peer.endpoint}, and it claims to come from {origin}"
        if _root(destination) != FQCN.ROOT_SERVER:
            return f"it is for {destination}; sites do not communicate with each other"
        allowed = SERVER_FROM_OPERATOR if operator else SERVER_FROM_SITE
    else:
        if _root(peer.endpoint) != FQCN.ROOT_SERVER or _root(origin) != FQCN.ROOT_SERVER:
            return f"it claims to come from {origin}; only the server may send messages to a site"
        if destination != here and not (_is_job(destination) and _root(destination) == here):
            return f"it is for {destination}"
        allowed = JOB_FROM_SERVER if _is_job(destination) else SITE_FROM_SERVER
    if headers.get(MessageHeaderKey.MSG_TYPE) in (MessageType.REPLY, MessageType.RETURN):
        return None
    channel, topic = _request(headers)
    if channel == STREAM_CHANNEL and topic in _STREAM_CONTROL:
        return None
    if (channel, topic) not in allowed and (channel, "*") not in allowed:
        return f"requests with topic {topic} on channel {channel} are not admitted"
    return None


def close_gate() -> None:
    """Drop every message that ``refusal`` refuses, in all of FLARE's cells in this process.

    The first ``_MAX_LOGGED`` different pairs of sender and reason are logged, each once.
    """
    process = CoreCell.process_message
    known: set[tuple[str, str]] = set()

    def process_message(
        cell: CoreCell, endpoint: Endpoint, connection: Connection, app_id: int, message: Message
    ) -> None:
        headers = message.headers if isinstance(message.headers, dict) else {}
        reason = refusal(cell.get_fqcn(), _peer(endpoint, connection), headers)
        if reason is None:
            process(cell, endpoint, connection, app_id, message)
        elif len(known) < _MAX_LOGGED and (endpoint.name, reason) not in known:
            known.add((endpoint.name, reason))
            log.warning("refused a message from %s: %s", endpoint.name, printable(reason[:300]))

    CoreCell.process_message = process_message


_MAX_LOGGED = 100
"""Largest number of refusals that a process logs."""


def _peer(endpoint: Endpoint, connection: Connection) -> Peer:
    scheme = connection.connector.params.get(DriverParams.SCHEME.value)
    properties = connection.get_conn_properties() or {}
    # messages of a process to itself arrive on a connection without parameters
    local = scheme == SCHEME or not connection.connector.params
    return Peer(endpoint.name, local, properties.get(DriverParams.PEER_CN.value))


def _request(headers: Mapping[str, Any]) -> Request:
    """Return channel and topic of a request; if it is streamed, of the request in the stream."""
    request = tuple(
        str(headers.get(key)) for key in (MessageHeaderKey.CHANNEL, MessageHeaderKey.TOPIC)
    )
    if request == (STREAM_CHANNEL, STREAM_DATA_TOPIC):
        request = tuple(
            str(headers.get(key)) for key in (StreamHeaderKey.CHANNEL, StreamHeaderKey.TOPIC)
        )
    return request[0], request[1]


def _root(name: str) -> str:
    return str(FQCN.split(name)[0])


def _is_job(name: str) -> bool:
    return len(FQCN.split(name)) > 1
