"""A wheel of the running package for the kits of a federation.

The package's name is not registered on the package index, so a site that installs by name would
run the code of whoever registers it. A wheel in the kit, with its SHA-256 sum, installs the
organizers' version.
"""

from __future__ import annotations

import csv
import hashlib
import io
import subprocess
import sys
from base64 import urlsafe_b64encode
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from fedmerge_peft import __version__
from fedmerge_peft.errors import FederateError

WHEEL = f"fedmerge_peft-{__version__}-py3-none-any.whl"
SUMS = "SHA256SUMS"

_PACKAGE = Path(__file__).parents[1]
_OF_THE_INSTALLATION = ("INSTALLER", "RECORD", "REQUESTED", "direct_url.json", "uv_cache.json")
"""Files of a dist-info folder that the installer writes."""
_DATE = (2020, 2, 2, 0, 0, 0)
"""Date of all members, so that equal files give equal wheels."""


def write_wheel(folder: Path) -> str | None:
    """Write the wheel of the running package, and its sum in the format of ``sha256sum``.

    In a checkout, hatchling builds the wheel. An installed package is packed again from the files
    that its installation recorded, whose sums must be unchanged.

    Returns:
        The SHA-256 sum in hexadecimal; None if this is a checkout without hatchling, or a package
        without a record of its files.

    Raises:
        FederateError: hatchling fails, or a file has changed since the package was installed.
    """
    checkout = _PACKAGE.parents[1]
    if (checkout / "pyproject.toml").is_file():
        written = _build(checkout, folder)
    else:
        written = _pack(_PACKAGE.parent, folder / WHEEL)
    if not written:
        return None
    digest = hashlib.sha256((folder / WHEEL).read_bytes()).hexdigest()
    (folder / SUMS).write_text(f"{digest}  {WHEEL}\n", encoding="utf-8")
    return digest


def _build(checkout: Path, folder: Path) -> bool:
    if find_spec("hatchling") is None:
        return False
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel"]
    done = subprocess.run(  # noqa: S603 - the paths are ours
        [*command, "--directory", str(folder.resolve())],
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode or not (folder / WHEEL).is_file():
        lines = done.stderr.strip().splitlines() or [f"it wrote no {WHEEL}"]
        raise FederateError(
            f"hatchling cannot build the wheel of {checkout}: {lines[-1]}; for its whole output, "
            "run there: python -m hatchling build --target wheel"
        )
    return True


def _pack(packages: Path, wheel: Path) -> bool:
    """Write the wheel of the package that is installed in the folder ``packages``.

    Returns:
        False if the installation did not record the package's files.
    """
    distributions = metadata.distributions(name="fedmerge-peft", path=[str(packages)])
    installed = next(iter(distributions), None)
    files = sorted(installed.files or [], key=str) if installed is not None else []
    members = {
        str(file): file
        for file in files
        if file.hash is not None
        and (file.parts[0] == "fedmerge_peft" or file.parts[0].endswith(".dist-info"))
        and file.name not in _OF_THE_INSTALLATION
        and "__pycache__" not in file.parts
    }
    if "fedmerge_peft/__init__.py" not in members:  # such as an editable installation
        return False
    record = []
    with ZipFile(wheel, "w") as archive:
        for name, file in members.items():
            content = file.read_binary()
            digest = _record_digest(content)
            if file.hash is None or (file.hash.mode, file.hash.value) != ("sha256", digest):
                raise FederateError(
                    f"{packages / name} has changed since the package was installed; install the "
                    "package again before you give it to other sites"
                )
            _add(archive, name, content)
            record.append((name, f"sha256={digest}", len(content)))
        (info,) = {name.partition("/")[0] for name in members if ".dist-info/" in name}
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([*record, (f"{info}/RECORD", "", "")])
        _add(archive, f"{info}/RECORD", table.getvalue().encode())
    return True


def _add(archive: ZipFile, name: str, content: bytes) -> None:
    member = ZipInfo(name, _DATE)
    member.compress_type = ZIP_DEFLATED
    member.external_attr = 0o100644 << 16
    archive.writestr(member, content)


def _record_digest(content: bytes) -> str:
    """Return the SHA-256 sum of a file in the encoding of ``RECORD`` (PEP 376, PEP 427)."""
    return urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
