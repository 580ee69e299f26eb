"""FLARE finds no configuration among the other files of a kit, nor below the current folder."""

import subprocess
import sys

import pytest

pytest.importorskip("nvflare")

HOSTILE = '{"comm_driver_path": "DRIVERS", "hostile": true}'
PROGRAM = """
import sys
from nvflare.fuel.f3.comm_config import CommConfigurator
from nvflare.fuel.f3.communicator import load_comm_drivers
from nvflare.fuel.utils.config_service import ConfigService
from fedmerge_peft.sites.flare.configuration import search_only_own_files

if sys.argv[1] == "restricted":
    search_only_own_files()
if sys.argv[2:]:
    ConfigService.initialize(section_files={"startup": "fed_client.json"}, config_path=sys.argv[2:])
    print("hostile" in (ConfigService.get_section("startup") or {}))
load_comm_drivers()
"""


@pytest.fixture
def folder(tmp_path):
    """A kit whose organizer, or data, brought files with the names of FLARE's configuration."""
    kit = tmp_path / "kit"
    for place in ("startup", "local", "adapters", "drivers"):
        (kit / place).mkdir(parents=True)
    (kit / "startup" / "fed_client.json").write_text('{"own": true}')
    (kit / "drivers" / "hostile_driver.py").write_text(
        f"open({str(tmp_path / 'executed')!r}, 'w').close()"
    )
    text = HOSTILE.replace("DRIVERS", str(kit / "drivers"))
    (kit / "adapters" / "comm_config.json").write_text(text)
    (kit / "fed_client.json").write_text(text)
    return kit


def run(folder, *arguments):
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip(), (folder.parent / "executed").exists()


@pytest.mark.parametrize("kit", [True, False], ids=["kit", "current folder"])
def test_files_outside_startup_and_local_configure_nothing(folder, kit):
    """A process of a site is given its kit; the operator's has the current folder."""
    arguments = [str(folder)] * kit
    assert run(folder, "restricted", *arguments) == ("False" * kit, False)
    assert run(folder, "as it comes", *arguments) == ("True" * kit, True)
