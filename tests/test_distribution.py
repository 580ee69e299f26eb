"""The wheel: built from the sdist, installed into an environment without this checkout, run."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


def run(*command, cwd):
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "VIRTUAL_ENV")
    }
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist of this tree, and the wheel built from the sdist."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (tree,) = (folder / "unpacked").iterdir()
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=tree)
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel, tree


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """An environment with the wheel alone.

    Its requirements come from the environment of the tests, without the editable install.
    """
    import numpy

    home = tmp_path_factory.mktemp("home")
    run(sys.executable, "-m", "venv", "--without-pip", home / "venv", cwd=home)
    python = home / "venv" / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        built[1],
        cwd=home,
    )
    (packages,) = (home / "venv" / "lib").glob("python*/site-packages")
    # its own .pth files are not followed
    (packages / "requirements.pth").write_text(str(Path(numpy.__file__).parents[1]) + "\n")
    return python


def test_the_sdist_has_the_files_for_tests_and_site(built):
    tree = built[2]
    for name in (
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "constraints.txt",
        "constraints-hashed.txt",
        "Makefile",
        "properdocs.yml",
        "docs/index.md",
        "tests/conftest.py",
    ):
        assert (tree / name).is_file(), name
    assert not [
        path
        for path in tree.rglob("*")
        if path.suffix in (".safetensors", ".parquet") or path.name in ("environment.json", ".git")
    ]


def test_the_wheel_has_the_package_and_its_data_alone(built):
    names = zipfile.ZipFile(built[1]).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"fedmerge_peft"}
    for name in (
        "py.typed",
        "report/page.html.j2",
        "data/embedded/support_tickets.csv",
        "shipped_recipes/quickstart.yaml",
    ):
        assert f"fedmerge_peft/{name}" in names
    ours = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*.py")}
    assert ours == {name for name in names if name.endswith(".py")}


def test_an_installation_packs_the_wheel_that_it_was_installed_from(built, installed, tmp_path):
    """Kits of a federation have this wheel: equal members but for the order of the record."""
    program = f"from fedmerge_peft.sites.wheel import *; write_wheel(Path({str(tmp_path)!r}))"
    run(installed, "-c", program, cwd=tmp_path)
    first, again = (zipfile.ZipFile(path) for path in (built[1], tmp_path / built[1].name))
    assert sorted(first.namelist()) == sorted(again.namelist())
    for name in first.namelist():
        old, new = first.read(name).splitlines(), again.read(name).splitlines()
        assert (sorted(old) == sorted(new)) if name.endswith("/RECORD") else (old == new), name


def test_the_program_runs_from_the_wheel(installed, tmp_path):
    program = installed.with_name("fedmerge")
    where = run(
        installed, "-c", "import fedmerge_peft; print(fedmerge_peft.__file__)", cwd=tmp_path
    )
    assert Path(where.strip()).is_relative_to(installed.parents[1])
    assert "Start with: fedmerge ls" in run(program, "--help", cwd=tmp_path)
    listed = {line.split()[0] for line in run(program, "ls", cwd=tmp_path).splitlines()}
    assert listed == {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    for name in listed:
        assert f"{name} is valid" in run(program, "validate", name, cwd=tmp_path)
    small = ["rounds=1", "baselines=[]", "data.max_train=6", "training.device=cpu"]
    assert "round 1/1" in run(program, "run", "smoke", *small, "--out", "first", cwd=tmp_path)
    run(program, "report", "first", "--out", "first.html", "--figures", "figures", cwd=tmp_path)
    run(program, "export", "first", "--client", "Fen Water", "--to", "fen", cwd=tmp_path)
    assert (tmp_path / "first.html").is_file()
    assert (tmp_path / "figures" / "weights.png").is_file()
    assert (tmp_path / "fen" / "adapter_model.safetensors").is_file()


def test_a_plugin_is_found_once_it_is_installed(installed, tmp_path):
    example = tmp_path / "plugin"
    shutil.copytree(ROOT / "examples" / "plugin", example)
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, cwd=example)
    (wheel,) = tmp_path.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", installed]
    program, recipe = installed.with_name("fedmerge"), example / "recipe.yaml"
    small = ["rounds=1", "training.device=cpu", "--out", "plugged"]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    try:
        assert "  cautious " in run(program, "ls", "--all", cwd=tmp_path)
        assert "round 1/1" in run(program, "run", recipe, *small, cwd=tmp_path)
        run(program, "report", "plugged", cwd=tmp_path)
    finally:
        run(*pip, "uninstall", "--quiet", "--yes", "fedmerge-example", cwd=tmp_path)
    assert "cautious" not in run(program, "ls", "--all", cwd=tmp_path)


def test_the_version_is_one(built):
    from fedmerge_peft import __version__

    assert f"-{__version__}-" in built[1].name
    assert built[0].name == f"fedmerge_peft-{__version__}.tar.gz"
