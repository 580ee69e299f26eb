"""The GPU benchmark runs at tiny size on a CPU, and reports the parts that it leaves out."""

import importlib
import os
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

SPEED = Path(__file__).parents[2] / "benchmarks" / "speed"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(SPEED)
    return importlib.import_module("gpu")


def test_all_parts_run_at_tiny_size(gpu, tmp_path, capsys):
    page = tmp_path / "gpu.md"
    gpu.main(["--tiny", "--out", str(page)])
    text = page.read_text(encoding="utf-8")
    parts = re.split(r"^## (\w+)$", text, flags=re.MULTILINE)
    measured = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert list(measured) == list(gpu.PARTS)
    for name in ("together", "overhead", "prefix", "evaluation"):
        ratios = re.findall(r"^\| tiny[^|]+\| (\d+\.\d\d) \|", measured[name], re.MULTILINE)
        assert len(ratios) == 1
        assert float(ratios[0]) > 0
    assert "Not measured with this setup." in measured["server"]
    rows = re.findall(r"^\| 4 bits: batch 1, 4 in one pass", measured["qlora"], re.MULTILINE)
    assert len(rows) == (find_spec("bitsandbytes") is not None)
    assert "Skipped" not in text


def test_parts_that_need_more_time_than_is_left_are_skipped(gpu, tmp_path):
    gpu.main(["--tiny", "--seconds", "1", "--out", str(tmp_path / "gpu.md")])
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert text.count("Skipped: not enough time is left.") == len(gpu.PARTS)


def test_all_parts_together_fit_into_ten_minutes(gpu):
    assert sum(needed for _, needed in gpu.PARTS.values()) <= 600


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests the error without a GPU")
@pytest.mark.parametrize("arguments", [[], ["nosuch", "--tiny"]])
def test_a_missing_gpu_and_an_unknown_part_are_errors(gpu, arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu.main(arguments)
    assert stopped.value.code == 2
    assert ("no CUDA GPU" if not arguments else "unknown part: nosuch") in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="a shell script")
def test_the_script_passes_its_arguments(tmp_path):
    done = subprocess.run(
        [SPEED / "gpu.sh", "--tiny", "prefix"],
        env={**os.environ, "PYTHON": "echo"},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [
        "benchmarks/speed/gpu.py", "--out", "build/gpu.md", "--tiny", "prefix",
    ]  # fmt: skip
