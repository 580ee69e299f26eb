"""Commands that install the requirements of this package's extras."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires


def install_command(extra: str) -> str:
    """Return the command that installs the requirements of an extra, by their own names.

    This package is not on the package index, where anyone may register its name. A command with
    that name could therefore run a stranger's code. If the requirements are unknown, the command
    installs the extra from a source checkout.
    """
    from packaging.requirements import Requirement

    try:
        lines = requires("fedmerge-peft") or []
    except PackageNotFoundError:
        lines = []
    names = [
        f"'{requirement.name}{requirement.specifier}'"
        for requirement in map(Requirement, lines)
        if requirement.marker is not None
        and requirement.marker.evaluate({"extra": extra})
        and not requirement.marker.evaluate({"extra": ""})
    ]
    return f"pip install {' '.join(names)}" if names else f"pip install -e '.[{extra}]'"
