"""The benchmark of finetuning gains and gaps: its table follows from the runs' records."""

from pathlib import Path

import pandas as pd
import pytest

from fedmerge_peft import federate

QUALITY = Path(__file__).parents[2] / "benchmarks" / "quality"


def test_gains_and_gaps_follow_from_the_records(smoke, smoke_engine, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(QUALITY)
    import gaps

    scored = ["rounds=4", "baselines=[]", *gaps.SCORED]
    runs = {
        f"{name}-seed0": federate(
            smoke(f"strategy={name}", *scored), tmp_path / name, engine=smoke_engine
        )
        for name in ("fedavg", "local")
    }
    table = pd.concat([gaps.curves(name, run) for name, run in runs.items()])
    fedavg = runs["fedavg-seed0"]
    for row, record in zip(
        table[table["method"] == "fedavg"].itertuples(), fedavg.records, strict=True
    ):
        gain = record["finetuned"]["mean"] - record["served"]["mean"]
        assert (row.round, row.gain) == (record["round"], pytest.approx(gain))
    lost = fedavg.records[0]["finetuned"]["mean"] - fedavg.records[1]["served"]["mean"]
    assert table.iloc[0]["gap"] == pytest.approx(lost)
    local = table[table["method"] == "local"]
    assert local["gap"].abs().max() == 0.0  # a client is sent what it trained
    served = table[table["round"] > 1].groupby("method")["served"].mean()
    lines = gaps.rows_of(table)
    assert [line.split("|")[1].strip() for line in lines] == list(
        served.sort_values(ascending=False).index
    )
    assert f"| {100 * served['local']:.1f} ± nan" in "\n".join(lines)
    gaps.draw(table, tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").stat().st_size > 0
