"""The benchmark of accuracy against d: FedAvg is d = 1 of each method, and means are over seeds."""

from pathlib import Path
from types import SimpleNamespace

import pandas as pd

QUALITY = Path(__file__).parents[2] / "benchmarks" / "quality"


def made_run(mean):
    return SimpleNamespace(summary={"final": {"served": {"mean": mean, "worst": mean / 2}}})


def test_fedavg_is_d_1_of_each_method(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(QUALITY)
    import adapters

    runs = {f"fedavg-d1-seed{seed}": made_run(0.2 + seed / 10) for seed in range(3)}
    for place, (method, counts) in enumerate(adapters.ADAPTERS.items()):
        for d in counts:
            for seed in range(3):
                runs[f"{method}-d{d}-seed{seed}"] = made_run((place + d) / 100)
    table = pd.concat([adapters.scores(name, runs) for name in adapters.SETTINGS])
    lines = adapters.lines_of(table)
    assert len(lines) == 2 * sum(1 + len(counts) for counts in adapters.ADAPTERS.values())
    assert lines[0].endswith("| fedmerge | 1 | 30.0 ± 10.0 | 15.0 |")
    assert lines[1].endswith("| fedmerge | 2 | 2.0 ± 0.0 | 1.0 |")
    assert sum("| ifca | 1 | 30.0 ± 10.0 | 15.0 |" in line for line in lines) == 2
    adapters.draw(table, tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").stat().st_size > 0
