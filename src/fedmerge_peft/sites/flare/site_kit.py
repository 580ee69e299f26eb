"""Startup kit of a site: untrusted data from the organizer of the federation.

The files of a kit name classes, modules and loggers, which NVIDIA FLARE would run. Before each
start, the site therefore writes these files itself. FLARE gets only the certificates, the site's
key, the names of site and federation, and the server's address from the organizer.

startup/   certificates and key are unchanged; fed_client.json is rewritten
local/     is removed and rewritten: resources, roles, logging
"""

from __future__ import annotations

import json
import os
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

from fedmerge_peft.errors import FederateError
from fedmerge_peft.sites.config import FederationFile, check_names
from fedmerge_peft.sites.flare.provision import ALLOWED_CLASSES, write_roles

_STARTUP = {
    "rootCA.pem",
    "client.crt",
    "client.key",
    "fed_client.json",
    "start.sh",
    "stop_fl.sh",
    "sub_start.sh",
}
"""Files of ``startup/``. The scripts come from FLARE and are not used."""
_COMPONENTS = [
    {
        "id": "resource_manager",
        "path": "nvflare.app_common.resource_managers.gpu_resource_manager.GPUResourceManager",
        "args": {"num_of_gpus": 0, "mem_per_gpu_in_GiB": 0, "expiration_period": 300},
    },
    {
        "id": "resource_consumer",
        "path": "nvflare.app_common.resource_consumers.gpu_resource_consumer.GPUResourceConsumer",
        "args": {},
    },
    {"id": "process_launcher", "path": f"{ALLOWED_CLASSES}launchers.SiteJobLauncher", "args": {}},
]
"""FLARE's components of a site. The launcher starts jobs behind the gate (``gate``)."""


def site_name(kit: Path) -> str:
    """Return the name of a kit's site. Raises ``FederateError`` if it is not a site's kit."""
    try:
        text = (kit / "startup" / "fed_client.json").read_text(encoding="utf-8")
        return str(json.loads(text)["client"]["fqsn"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FederateError(
            f"{kit}: not a site's kit, because startup/fed_client.json cannot be read or names no "
            "site; fedmerge federate prepare writes the kits of the sites below sites/"
        ) from error


def secure_site_kit(kit: Path, data: Path | None = None) -> str:
    """Replace FLARE's configuration in a site's kit; return the site's name.

    Args:
        kit: The site's kit.
        data: Path of the site's own examples, which may be a link or contain links.

    Raises:
        FederateError: The kit is incomplete or cannot be written. Or it contains a link that is not
            part of ``data``, or an unknown file in ``startup/``. Or its ``federation.json`` has
            invalid names, or does not have the site.
    """
    name, federation = site_name(kit), FederationFile.read(kit)
    check_names(federation.sites)
    if name not in federation.sites:
        raise FederateError(
            f"{kit}: startup/fed_client.json names the site {name!r}, which is not a site of "
            "federation.json; copy both files again from the kit that you received"
        )
    _refuse_links(kit, data)
    if unknown := sorted(
        path.name
        for path in (kit / "startup").iterdir()
        if path.name not in _STARTUP or not path.is_file()
    ):
        raise FederateError(
            f"{kit / 'startup' / unknown[0]} does not belong to a site's kit; remove it if you "
            "trust the rest of the kit"
        )
    _write(kit / "startup" / "fed_client.json", _connection(federation, name))
    try:
        shutil.rmtree(kit / "local", ignore_errors=True)
        (kit / "local").mkdir()
    except OSError as error:
        raise FederateError(
            f"{kit / 'local'} cannot be written again ({error.strerror}); remove it, or make {kit} "
            "writable"
        ) from error
    _write(kit / "local" / "resources.json", _resources())
    _write(kit / "local" / "log_config.json", _logging())
    write_roles(kit)
    return name


def _refuse_links(kit: Path, data: Path | None) -> None:
    """Raise ``FederateError`` for a link in the kit outside the site's own data.

    Through a link, the site would read or write files outside its kit.
    """
    own = None if data is None else data.absolute()
    for folder, folders, files in os.walk(kit):
        for path in (Path(folder, name) for name in (*folders, *files)):
            place = path.absolute()
            if path.is_symlink() and (own is None or own not in (place, *place.parents)):
                raise FederateError(
                    f"{path} is a link to {path.readlink()}; a kit contains only files and "
                    "folders. Remove the link, or replace it by a copy of its target if you trust "
                    "the target"
                )


def _connection(federation: FederationFile, name: str) -> dict[str, Any]:
    """Return the content of FLARE's ``fed_client.json``."""
    service = {"target": f"{federation.host}:{federation.port}", "scheme": "grpc"}
    return {
        "format_version": 2,
        "servers": [{"name": federation.project, "service": service, "identity": "server"}],
        "client": {
            "ssl_private_key": "client.key",
            "ssl_cert": "client.crt",
            "ssl_root_cert": "rootCA.pem",
            "fqsn": name,
            "is_leaf": True,
            "connection_security": "mtls",
        },
    }


def _resources() -> dict[str, Any]:
    """Return the content of FLARE's ``resources.json``. Logs are not streamed to the server."""
    return {
        "format_version": 2,
        "class_list_enforcement_mode": "enforce",
        "class_allow_list": [ALLOWED_CLASSES],
        "allow_log_streaming": False,
        "client": {"retry_timeout": 30, "compression": "Gzip"},
        "components": _COMPONENTS,
    }


def _logging() -> dict[str, Any]:
    """Return the logging configuration of the installed FLARE."""
    from nvflare.fuel.utils.log_utils import default_log_dict

    return dict(deepcopy(default_log_dict))


def _write(path: Path, value: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise FederateError(
            f"{path} cannot be written ({error.strerror}); free disk space, or make it writable"
        ) from error
