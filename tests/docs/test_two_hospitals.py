"""The commands of docs/two_hospitals.md run a federation of processes, from tables to adapters."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

PAGE = (Path(__file__).parents[2] / "docs" / "two_hospitals.md").read_text(encoding="utf-8")
FEDMERGE = [sys.executable, "-c", "from fedmerge_peft.cli import main; main()"]
SMALL = [
    "backbone.model=tiny:bert",
    "lora.layers_to_transform=[1]",
    "rounds=2",
    "data.max_train=6",
    "training.device=cpu",
]


def lines():
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL):
        yield from (shlex.split(line) for line in block.splitlines())


@pytest.fixture
def running():
    """Processes of a test, which end with it."""
    processes = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def test_every_command_runs_in_order(tmp_path, monkeypatch, running):
    """Server and sites run side by side; a copy to another machine is one to a folder here."""
    pytest.importorskip("nvflare", reason="needs the extra federate")
    from fedmerge_peft.sites.rehearse import free_port

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    for program in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(program, "two_hospitals.md", "exec"), {})
    (recipe,) = re.findall(r'```yaml title="hospitals.yaml"\n(.*?)```', PAGE, re.DOTALL)
    (tmp_path / "hospitals.yaml").write_text(recipe, encoding="utf-8")
    server = f"localhost:{free_port()}"
    for program, *arguments in lines():
        if program == "scp":
            shutil.copytree(arguments[1], Path(arguments[1]).name)
        if program != "fedmerge":
            continue
        words = [word.replace("north.example:8002", server) for word in arguments]
        if words[1] in ("rehearse", "prepare"):
            words += SMALL
        if words[1] in ("server", "site"):
            running.append(subprocess.Popen([*FEDMERGE, *words]))
        else:
            subprocess.run([*FEDMERGE, *words], check=True, timeout=300)
    for process in running:
        assert process.wait(timeout=60) == 0
    assert (tmp_path / "hospitals.html").is_file()
    for kit in ("federation/sites/north", "south"):
        name = Path(kit).name
        assert (tmp_path / kit / "adapters" / name / "adapter_model.safetensors").is_file()
