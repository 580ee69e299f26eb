"""Certificates and startup kits, by NVIDIA FLARE's provisioning, and what each end allows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from fedmerge_peft.errors import FederateError
from fedmerge_peft.sites.config import OPERATOR, Federation

OURS = "fedmerge_peft.sites.flare."
"""What classes a job may name, at the server and at sites: these and no others, so that no other job runs in a kit of ours."""
PROJECT = "project.yml"
_ORG = "federation"
_BUILDERS = [
    {"path": "nvflare.lighter.impl.workspace.WorkspaceBuilder"},
    {
        "path": "nvflare.lighter.impl.static_file.StaticFileBuilder",
        "args": {"config_folder": "config", "scheme": "grpc"},
    },
    {"path": "nvflare.lighter.impl.cert.CertBuilder"},
    {"path": "nvflare.lighter.impl.signature.SignatureBuilder"},
]
_NOTHING = {"shell_commands": "none", "byoc": "none", "server-predeployed-flwr": "none"}
_ROLES = {
    "project_admin": {
        **dict.fromkeys(
            (
                "submit_job",
                "clone_job",
                "manage_job",
                "download_job",
                "view",
                "operate",
                "app_command",
            ),
            "any",
        ),
        **_NOTHING,
    },
    "org_admin": {
        "manage_job": "o:submitter",
        "download_job": "o:submitter",
        "view": "any",
        "operate": "o:site",
        **_NOTHING,
    },
    "lead": {
        "submit_job": "any",
        "manage_job": "n:submitter",
        "download_job": "n:submitter",
        "view": "any",
        **_NOTHING,
    },
    "member": {"view": "any", **_NOTHING},
}
"""NVIDIA FLARE's roles, as every kit of ours has them: nobody reads a site's files from afar, and nobody brings code."""


def provision(federation: Federation, out: Path) -> None:
    """Make certificates and kits: ``server``, ``operator``, ``sites/<name>``, and ``authority`` with the key that signs them.

    Raises ``FederateError`` where FLARE refuses a name or a host.
    """
    from nvflare.lighter.prov_utils import prepare_builders
    from nvflare.lighter.provision import prepare_project
    from nvflare.lighter.provisioner import Provisioner

    asked = _project(federation)
    with TemporaryDirectory(prefix="fedmerge-") as scratch:
        try:
            with redirect_stdout(StringIO()) as said:
                context = Provisioner(scratch, prepare_builders(asked)).provision(
                    prepare_project(asked)
                )
        except (ValueError, RuntimeError, SystemExit) as error:
            raise FederateError(
                f"certificates cannot be made: {error or said.getvalue().strip()}"
            ) from error
        made = Path(scratch) / federation.project
        if context.get("build_error") or not (made / "prod_00").is_dir():
            raise FederateError(
                f"certificates cannot be made: {said.getvalue().strip() or 'NVIDIA FLARE does not say why'}"
            )
        for name, place in {
            "server": "server",
            OPERATOR: "operator",
            **{site: f"sites/{site}" for site in federation.sites},
        }.items():
            (out / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(made / "prod_00" / name, out / place)
        shutil.copytree(made / "state", out / "authority")
    (out / "authority").chmod(0o700)
    (out / "authority" / PROJECT).write_text(
        yaml.safe_dump(asked, sort_keys=False), encoding="utf-8"
    )
    for kit in (out / "server", *(out / "sites" / site for site in federation.sites)):
        (kit / "readme.txt").unlink(missing_ok=True)
        kit.chmod(0o700)


def _project(federation: Federation) -> dict[str, Any]:
    server = {
        "name": "server",
        "type": "server",
        "org": _ORG,
        "fed_learn_port": federation.port,
        "admin_port": federation.port,
    }
    hosts = {"host_names": [federation.host], "default_host": federation.host}
    sites = [{"name": site, "type": "client", "org": _ORG} for site in federation.sites]
    operator = {"name": OPERATOR, "type": "admin", "org": _ORG, "role": "project_admin"}
    return {
        "api_version": 3,
        "name": federation.project,
        "description": "A federation of fedmerge-peft",
        "participants": [{**server, **hosts}, *sites, operator],
        "builders": _BUILDERS,
    }


def site_name(kit: Path) -> str:
    """The name in a site's kit. Raises ``FederateError`` for a folder that is none."""
    try:
        return str(
            json.loads((kit / "startup" / "fed_client.json").read_text(encoding="utf-8"))["client"][
                "fqsn"
            ]
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FederateError(
            f"{kit}: no site's kit (startup/fed_client.json); prepare makes them, one below sites/ for each"
        ) from error


def settle(kit: Path, *, server: bool) -> None:
    """Write what the machine that a kit lies on allows: our classes alone, no shell, no logs to others, files inside the kit."""
    local = kit / "local"
    try:
        resources = json.loads((local / "resources.json.default").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FederateError(f"{kit}: no whole kit ({error}); unpack it again") from error
    resources |= {"class_list_enforcement_mode": "enforce", "class_allow_list": [OURS]}
    if server:
        _keep_inside(resources, kit.resolve() / "flare")
    else:
        resources["allow_log_streaming"] = False
        resources["components"] = [
            each for each in resources["components"] if each["id"] != "site_log_streamer"
        ]
    _write(local / "resources.json", resources)
    _write(local / "authorization.json", {"format_version": "1.0", "permissions": _ROLES})


def _keep_inside(resources: dict[str, Any], folder: Path) -> None:
    """Jobs and snapshots below the kit, and not in a temporary folder that all users of the machine share."""
    resources["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(
        folder / "snapshots"
    )
    for component in resources["components"]:
        if component["id"] == "job_manager":
            component["args"]["uri_root"] = str(folder / "jobs")


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
