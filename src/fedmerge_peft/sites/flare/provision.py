"""Certificates and kits from NVIDIA FLARE's provisioner, the server's policy, and FLARE's roles."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from fedmerge_peft.errors import FederateError
from fedmerge_peft.sites.config import OPERATOR, FederationFile

ALLOWED_CLASSES = "fedmerge_peft.sites.flare."
"""Prefix of the classes that a job's configuration may name, at the server and at the sites."""
PROJECT_FILE = "project.yml"
AUTHORITY_CERTIFICATE, AUTHORITY_KEY = "rootCA.pem", "rootCA.key"
"""Files of the authority: its certificate, and the key that signs all other certificates."""
_ORGANIZATION = "federation"
_BUILDERS = [
    {"path": "nvflare.lighter.impl.workspace.WorkspaceBuilder"},
    {
        "path": "nvflare.lighter.impl.static_file.StaticFileBuilder",
        "args": {"config_folder": "config", "scheme": "grpc"},
    },
    {"path": "nvflare.lighter.impl.cert.CertBuilder"},
    {"path": "nvflare.lighter.impl.signature.SignatureBuilder"},
]
_FORBIDDEN = {"shell_commands": "none", "byoc": "none", "server-predeployed-flwr": "none"}
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
        **_FORBIDDEN,
    },
    "org_admin": {
        "manage_job": "o:submitter",
        "download_job": "o:submitter",
        "view": "any",
        "operate": "o:site",
        **_FORBIDDEN,
    },
    "lead": {
        "submit_job": "any",
        "manage_job": "n:submitter",
        "download_job": "n:submitter",
        "view": "any",
        **_FORBIDDEN,
    },
    "member": {"view": "any", **_FORBIDDEN},
}
"""Rights of FLARE's roles at the server and the sites: none may run shell commands or custom
code."""


def provision(federation: FederationFile, out: Path) -> None:
    """Create certificates and kits below ``out``.

    The folders are ``server``, ``operator``, ``sites/<name>``, and ``authority``, which holds the
    signing key. Each private key is in one of the folders only, in a file of mode 0600.

    Raises:
        FederateError: FLARE cannot create the certificates: it refuses a name or the host, for
            example.
    """
    from nvflare.lighter.prov_utils import prepare_builders
    from nvflare.lighter.provision import prepare_project
    from nvflare.lighter.provisioner import Provisioner

    project = _project(federation)
    with TemporaryDirectory(prefix="fedmerge-") as scratch:
        try:
            with redirect_stdout(StringIO()) as output:
                context = Provisioner(scratch, prepare_builders(project)).provision(
                    prepare_project(project)
                )
        except (ValueError, RuntimeError, SystemExit) as error:
            reason = str(error)
            if isinstance(error, SystemExit):  # its text is only a number
                reason = output.getvalue().strip() or "NVIDIA FLARE gives no reason"
            raise FederateError(f"certificates cannot be created: {reason}") from error
        workspace = Path(scratch) / federation.project
        if context.get("build_error") or not (workspace / "prod_00").is_dir():
            reason = output.getvalue().strip() or "NVIDIA FLARE gives no reason"
            raise FederateError(f"certificates cannot be created: {reason}")
        for name, place in {
            "server": "server",
            OPERATOR: "operator",
            **{site: f"sites/{site}" for site in federation.sites},
        }.items():
            (out / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(workspace / "prod_00" / name, out / place)
        _keep_authority(workspace / "state" / "cert.json", out / "authority")
    (out / "authority" / PROJECT_FILE).write_text(
        yaml.safe_dump(project, sort_keys=False), encoding="utf-8"
    )
    for kit in (out / "server", *(out / "sites" / site for site in federation.sites)):
        (kit / "readme.txt").unlink(missing_ok=True)
        kit.chmod(0o700)


def _keep_authority(state: Path, folder: Path) -> None:
    """Write the authority's certificate and signing key into one file each.

    FLARE's state also contains copies of all participants' private keys. These are not written:
    each of them is in its participant's kit only.
    """
    certificates = json.loads(state.read_text(encoding="utf-8"))
    folder.mkdir(mode=0o700)
    for name, key in ((AUTHORITY_CERTIFICATE, "root_cert"), (AUTHORITY_KEY, "root_pri_key")):
        with open(folder / name, "x", encoding="ascii", opener=_owner_only) as file:
            file.write(certificates[key])


def _owner_only(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _project(federation: FederationFile) -> dict[str, Any]:
    server = {
        "name": "server",
        "type": "server",
        "org": _ORGANIZATION,
        "fed_learn_port": federation.port,
        "admin_port": federation.port,
    }
    hosts = {"host_names": [federation.host], "default_host": federation.host}
    sites = [{"name": site, "type": "client", "org": _ORGANIZATION} for site in federation.sites]
    operator = {"name": OPERATOR, "type": "admin", "org": _ORGANIZATION, "role": "project_admin"}
    return {
        "api_version": 3,
        "name": federation.project,
        "description": "A federation of fedmerge-peft",
        "participants": [{**server, **hosts}, *sites, operator],
        "builders": _BUILDERS,
    }


def write_server_policy(kit: Path) -> None:
    """Write the policy of the server's kit into ``local``.

    Jobs may name only ``ALLOWED_CLASSES``, and start behind the gate. Roles have the rights of
    ``_ROLES``, and jobs are stored inside the kit.

    Raises:
        FederateError: The kit is incomplete.
    """
    local = kit / "local"
    try:
        resources = json.loads((local / "resources.json.default").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FederateError(f"{kit}: incomplete kit ({error}); copy it again") from error
    resources |= {"class_list_enforcement_mode": "enforce", "class_allow_list": [ALLOWED_CLASSES]}
    for component in resources["components"]:
        if component["id"] == "process_launcher":
            component["path"] = f"{ALLOWED_CLASSES}launchers.ServerJobLauncher"
    _store_inside(resources, kit.resolve() / "flare")
    _write(local / "resources.json", resources)
    write_roles(kit)


def write_roles(kit: Path) -> None:
    """Write the rights of FLARE's roles into a kit."""
    roles = {"format_version": "1.0", "permissions": _ROLES}
    _write(kit / "local" / "authorization.json", roles)


def _store_inside(resources: dict[str, Any], folder: Path) -> None:
    """Make FLARE store jobs and snapshots in ``folder``, not in a shared temporary folder."""
    resources["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(
        folder / "snapshots"
    )
    for component in resources["components"]:
        if component["id"] == "job_manager":
            component["args"]["uri_root"] = str(folder / "jobs")


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
