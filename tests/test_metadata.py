"""The package's metadata is consistent: version, dependencies and tools."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fedmerge_peft import __version__

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TRACKERS = {"trackio"}
"""Imported only if the recipe names it, so that whoever names it installs it."""


def name_of(requirement):
    """The normalized name in ``"Foo_bar[extra]>=1"``."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def imported():
    """Top-level packages that the source imports, at any depth."""
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield node.module.partition(".")[0]


def test_every_import_is_declared():
    extras = PROJECT["optional-dependencies"]
    optional = [line for name, lines in extras.items() if name != "dev" for line in lines]
    declared = {name_of(line) for line in [*PROJECT["dependencies"], *optional]}
    homes = packages_distributions()
    others = set(imported()) - sys.stdlib_module_names - TRACKERS - {"fedmerge_peft"}
    assert not {
        package
        for package in others
        if not declared & {name_of(home) for home in homes.get(package, [package])}
    }


def test_every_dependency_is_pinned():
    pinned = {
        name_of(line) for line in (ROOT / "constraints.txt").read_text().splitlines()[1:] if line
    }
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    declared = {name_of(line) for line in [*PROJECT["dependencies"], *extras]}
    assert declared - pinned <= {"fedmerge-peft", "bitsandbytes"}  # itself; for GPUs alone


def test_the_hashed_constraints_are_the_same_versions_with_sums():
    text = (ROOT / "constraints-hashed.txt").read_text()
    hashed = {}
    for block in re.split(r"(?<!\\)\n", text.strip()):
        first, *sums = (line.strip() for line in block.split(" \\\n"))
        requirement = Requirement(first)
        assert sums, first
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", line) for line in sums), first
        hashed[canonicalize_name(requirement.name)] = str(requirement.specifier)
    lines = (ROOT / "constraints.txt").read_text().splitlines()[1:]
    pinned = {canonicalize_name(one.name): str(one.specifier) for one in map(Requirement, lines)}
    assert {name: hashed.get(name) for name in pinned} == pinned


def test_the_version_has_one_source():
    assert "version" not in PROJECT
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest[1] == __version__


def test_every_declared_python_is_tested():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    promised = [
        found[1] for line in PROJECT["classifiers"] if (found := re.search(r":: (3\.\d+)$", line))
    ]
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == promised
    assert PROJECT["requires-python"] == f">={promised[0]}"


def test_pre_commit_runs_the_pinned_ruff():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (revision,) = (repo["rev"] for repo in hooks if "ruff" in repo["repo"])
    assert f"ruff=={revision.removeprefix('v')}" in (ROOT / "constraints.txt").read_text()


def test_tab_completion_shows_public_names_only():
    import fedmerge_peft

    shown = {name for name in dir(fedmerge_peft) if not name.startswith("__")}
    assert shown == set(fedmerge_peft.__all__)
