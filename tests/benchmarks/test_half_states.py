"""The program that compares updates from exact and from rounded states."""

import re
import runpy
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "speed" / "half_states.py"
TINY = ["lora.layers_to_transform=[1]", "training.epochs=1", "data.max_train=8",
        "training.learning_rate=0.01"]  # fmt: skip


def test_rounded_states_are_half_as_large_and_change_updates_slightly(capsys):
    runpy.run_path(str(PROGRAM))["main"]("smoke", TINY)
    exact, *rounded = capsys.readouterr().out.splitlines()
    size = re.fullmatch(r"smoke: ([\d.]+) MB of states, up to [\d.]+", exact)[1]
    for name, line in zip(["float16", "bfloat16"], rounded, strict=True):
        found = re.fullmatch(rf"  {name}: ([\d.]+) MB, updates ([\d.]+)%, losses ([\d.e-]+)", line)
        assert float(found[1]) <= 0.6 * float(size)
        assert float(found[2]) < 30
        assert 0 < float(found[3]) < 0.01
