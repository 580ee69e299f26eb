"""The GPU benchmark runs at tiny size on a CPU, and reports parts that fail or take too long."""

import importlib
import json
import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

SPEED = Path(__file__).parents[2] / "benchmarks" / "speed"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(SPEED)
    return importlib.import_module


@pytest.fixture
def gpu(benchmark):
    return benchmark("gpu")


def test_all_parts_run_at_tiny_size(gpu, tmp_path):
    page, parts = tmp_path / "gpu.md", list(gpu.PARTS)
    if find_spec("bitsandbytes") is None:
        parts.remove("qlora")
    gpu.main([*parts, "--tiny", "--out", str(page)])
    texts = re.split(r"^## (\w+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    measured = dict(zip(texts[1::2], texts[2::2], strict=True))
    assert list(measured) == parts
    rows = {
        name: re.findall(r"^\| (.+?) \| (\S+) \|", text, re.M) for name, text in measured.items()
    }
    counts = {
        "qlora": 4,
        "together": 1,
        "overhead": 2,
        "memory": 1,
        "prefix": 1,
        "evaluation": 1,
        "server": 4,
    }
    for name in parts:
        ratios = [(what, ratio) for what, ratio in rows[name] if what != "row"]
        assert len(ratios) == counts[name]
        for what, ratio in ratios:
            if "estimate over measured" in what or "operations" in what:
                assert ratio == "–"
            else:
                assert float(ratio) >= 0
    assert "not measured on a CPU" in measured["memory"]
    assert re.search(r"rounds [\d,]+ tokens/s, Trainer [\d,]+ tokens/s", measured["overhead"])
    assert re.search(r"\n\nCPU; \d{4}-\d\d-\d\d, commit", measured[parts[-1]])


@pytest.fixture
def fake(gpu, tmp_path, monkeypatch):
    """``fake({"a": [...], "b": "hang"})``: the command of a worker with these parts."""

    def make(parts):
        monkeypatch.setattr(gpu, "PARTS", {name: (1, f"Part {name}.") for name in parts})
        script = tmp_path / "worker.py"
        script.write_text(
            "import json, sys, time\n"
            f"parts = json.loads({json.dumps(parts)!r})\n"
            "print(json.dumps({'device': 'a device'}), flush=True)\n"
            "for name in sys.argv[1:]:\n"
            "    print(json.dumps({'row': f'| {name} |'}), flush=True)\n"
            "    if parts[name] == 'hang':\n"
            "        time.sleep(600)\n"
            "    if parts[name] == 'die':\n"
            "        sys.exit(3)\n"
            "    print(json.dumps(parts[name]), flush=True)\n"
            "    if 'error' in parts[name]:\n"
            "        sys.exit(1)\n"
        )
        return [sys.executable, str(script)]

    return make


def test_parts_that_fail_die_or_overrun_do_not_stop_the_others(gpu, fake):
    ended = {"ended": True}
    parts = {"a": ended, "b": {"error": "Failed: no."}, "c": "die", "d": "hang", "e": ended}
    pages = []
    begin = time.monotonic()
    device, outcomes = gpu.run_parts(
        list(parts), fake(parts), 8.0, lambda *found: pages.append(gpu.page(*found))
    )
    assert time.monotonic() - begin < 8
    assert device == "a device"
    assert [outcome.rows for outcome in outcomes.values()] == [[f"| {name} |"] for name in parts]
    errors = [outcome.error for outcome in outcomes.values()]
    assert errors[:3] == ["", "Failed: no.", "The process ended early, with status 3."]
    assert re.fullmatch(r"Cut after \d\.\d\d s\.", errors[3])
    assert errors[4] == ""
    assert len(pages) == len(parts)
    assert "## b\n\nPart b.\n" in pages[-1]
    assert "| b |\n\nFailed: no.\n" in pages[-1]


def test_time_that_a_part_does_not_use_goes_to_the_next_ones(gpu, fake):
    parts = {"a": {"ended": True}, "b": {"ended": True}, "c": "hang"}
    _, outcomes = gpu.run_parts(list(parts), fake(parts), 3.0)
    assert 1.5 < outcomes["c"].seconds < 3.1


def test_a_part_that_does_not_end_well_makes_the_exit_status_1(gpu, fake, tmp_path, monkeypatch):
    command = fake({"a": {"error": "Failed: no."}, "b": {"ended": True}})
    run = gpu.run_parts
    monkeypatch.setattr(gpu, "run_parts", lambda names, _, *rest: run(names, command, *rest))
    page = tmp_path / "gpu.md"
    with pytest.raises(SystemExit, match="not measured completely: a; see") as stopped:
        gpu.main(["--tiny", "--out", str(page)])
    assert isinstance(stopped.value.code, str)  # printed to stderr, with status 1
    assert "Failed: no." in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "OutOfMemoryError: CUDA out of memory"),
        (ValueError(""), "ValueError: no message"),
    ],
)
def test_the_worker_reports_errors_and_rows_before_them(benchmark, monkeypatch, error, words):
    def part(bench):
        yield "a row"
        raise error

    monkeypatch.setattr(benchmark("gpu_parts"), "prefix", part)
    events = []
    assert not benchmark("gpu_worker").work(["prefix", "server"], None, events.append)
    assert events == [{"row": "a row"}, {"error": f"Failed: {words}"}]


def test_qlora_comes_first_and_everything_fits_into_ten_minutes(gpu):
    assert next(iter(gpu.PARTS)) == "qlora"
    script = (SPEED / "gpu.sh").read_text()
    tests = int(re.search(r"timeout --kill-after 5 (\d+) ", script)[1])
    default = int(re.search(r"default: (\d+)\"", (SPEED / "gpu.py").read_text())[1])
    assert tests + 5 + default <= 570


def test_the_large_decoder_has_8_billion_parameters_and_is_written_in_parts(benchmark, tmp_path):
    from transformers import LlamaConfig

    random_llama, parts = benchmark("random_llama"), benchmark("gpu_parts")
    shapes = random_llama.shapes(LlamaConfig(**parts.GPU.large))
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 8_030_261_248
    for name, expected in (("100 M", 1e8), ("1 B", 1e9)):
        sizes = {**parts.GPU.decoders[name], "tie_word_embeddings": True}
        shapes = random_llama.shapes(LlamaConfig(**sizes))
        count = sum(torch.Size(shape).numel() for shape in shapes.values())
        assert 0.9 * expected < count < 1.1 * expected


@pytest.mark.parametrize("tied", [True, False])
def test_a_random_llama_is_read_as_it_was_written(benchmark, tmp_path, tied):
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    random_llama = benchmark("random_llama")
    sizes = {**benchmark("gpu_parts").TINY.large, "tie_word_embeddings": tied}
    folder = tmp_path / "model"
    assert random_llama.write(folder, sizes, torch.bfloat16, "cpu") == str(folder)
    layers = list(folder.glob("model-layer-*.safetensors"))
    assert len(layers) == sizes["num_hidden_layers"]
    with safe_open(layers[0], "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    written = sum(torch.Size(shape).numel() for shape in random_llama.shapes(model.config).values())
    assert written == sum(parameter.numel() for parameter in model.parameters())
    weight = model.model.layers[1].mlp.up_proj.weight.detach()
    assert 0.015 < float(weight.float().std()) < 0.025
    random_llama.write(folder, sizes, torch.bfloat16, "cpu")  # it is there
    assert not list(tmp_path.glob("*.partial"))


def test_a_full_disk_is_an_error(benchmark, tmp_path, monkeypatch):
    random_llama = benchmark("random_llama")
    monkeypatch.setattr(random_llama.shutil, "disk_usage", lambda _: type("", (), {"free": 1000}))
    sizes = benchmark("gpu_parts").TINY.large
    with pytest.raises(OSError, match="set TMPDIR to a larger disk"):
        random_llama.write(tmp_path / "model", sizes, torch.bfloat16, "cpu")
    assert not (tmp_path / "model").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests the error without a GPU")
@pytest.mark.parametrize("arguments", [[], ["nosuch", "--tiny"]])
def test_a_missing_gpu_and_an_unknown_part_are_errors(gpu, arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu.main(arguments)
    assert stopped.value.code == 2
    assert ("no CUDA GPU" if not arguments else "unknown part: nosuch") in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="a shell script")
def test_the_script_runs_the_tests_and_passes_its_arguments(tmp_path):
    done = subprocess.run(
        [SPEED / "gpu.sh", "--tiny", "prefix"],
        env={**os.environ, "PYTHON": "echo", "OUT": str(tmp_path)},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == [
        "-m pytest -q -W default -m gpu tests/training/test_gpu.py",
        f"benchmarks/speed/gpu.py --out {tmp_path}/gpu.md --tiny prefix",
    ]
    assert (tmp_path / "gpu-tests.log").read_text() == done.stdout.splitlines()[0] + "\n"


@pytest.mark.skipif(os.name != "posix", reason="a shell script")
@pytest.mark.parametrize(("tests", "measured", "status"), [(1, 0, 1), (0, 1, 1), (0, 0, 0)])
def test_the_script_fails_if_tests_or_measurements_do(tmp_path, tests, measured, status):
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in "-m pytest"*) exit {tests};; *) exit {measured};; esac\n'
    )
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "OUT": str(tmp_path)}
    assert subprocess.run([SPEED / "gpu.sh"], env=environment).returncode == status
