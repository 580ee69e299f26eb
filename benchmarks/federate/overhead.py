"""What a round across sites costs beyond training: adapters of about 1 MB and 100 MB, to two sites over loopback with TLS, no training.

Server and sites are processes as in earnest; only training and evaluating are left out, so that what remains is merging, messages, TLS,
checks, logs, the update of the soup and the checkpoint. A site scores what it is sent and trains it in one exchange.

    python benchmarks/federate/overhead.py --megabytes 1 100 --rounds 6
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from fedmerge_peft import Recipe, Run
from fedmerge_peft.sites.flare.operator import run
from fedmerge_peft.sites.flare.provision import settle
from fedmerge_peft.sites.rehearse import await_server, rehearsal, start_server
from fedmerge_peft.sites.site.connection import ADDRESS, KIT
from fedmerge_peft.sites.supervisor import Child, environment

PER_RANK = 4 * (2 * 2 * 2 * 32)
"""Bytes that one more rank adds: two layers, two modules, two factors, 32 wide."""


def recipe_of(megabytes, rounds):
    """The smoke recipe with adapters of about this size: a tiny model, and a rank to match."""
    rank = max(1, round(megabytes * 1e6 / PER_RANK))
    small = [
        "data.max_train=4",
        "data.max_test=3",
        "data.filter.organisation=[Fen Water, Harbour Clinic]",
        "training.device=cpu",
    ]
    rest = [
        "baselines=[]",
        "strategy=fedavg",
        "evaluation.finetuned=false",
        f"rounds={rounds}",
        f"lora.r={rank}",
    ]
    return Recipe.load("smoke", [*small, *rest])


def start_idle_site(out, site):
    """FLARE's client, and a trainer that does nothing; as ``fedmerge federate site`` starts them."""
    kit = (out / "sites" / site).resolve()
    settle(kit, server=False)
    own = {**environment(), KIT: str(kit), ADDRESS: str(out / f"{site}.socket")}
    trainer = [sys.executable, str(Path(__file__).with_name("idle_site.py")), site]
    client = [sys.executable, "-m", "fedmerge_peft.sites.flare.child", "client", str(kit), site]
    return Child("trainer", trainer, out / f"{site}.out", own), Child(
        "connection", client, kit / "site.log", own
    )


def measure(megabytes, rounds, wire_dtype):
    """Seconds of each round after the first, from checkpoint to checkpoint; what a round's own clock says; and an adapter's bytes."""
    out = Path(tempfile.mkdtemp(prefix="fedmerge-"))
    children = []
    try:
        federation = rehearsal(
            recipe_of(megabytes, rounds), 2, out / "f", segment=rounds + 1, wire_dtype=wire_dtype
        )
        children.append(start_server(out / "f"))
        for site in federation.sites:
            children += start_idle_site(out / "f", site)
        await_server(federation, children[0])
        outcome = run(
            out / "f" / "operator",
            lambda line: print(line, file=sys.stderr),
            wait=300,
            least=2,
            patience=10,
        )
        if outcome["state"] != "ended":
            raise SystemExit(outcome["error"])
        done = Run.open(out / "f" / "server" / "run")
        times = [
            path.stat().st_mtime
            for path in sorted((done.path / "weights").glob("round-*.safetensors"))
        ]
        whole = [later - sooner for sooner, later in pairwise(times)]
        return whole, [record["seconds"] for record in done.records[1:]], 4 * done.soup.layout.size
    finally:
        for child in reversed(children):
            child.end()
        shutil.rmtree(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=float, nargs="+", default=[1, 100])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--wire-dtype", default="float32", choices=["float32", "bfloat16"])
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    print(
        "| adapter | wire | rounds | seconds a round, median | longest | of it messages and update |\n|---|---|---:|---:|---:|---:|"
    )
    for megabytes in asked.megabytes:
        whole, inner, size = measure(megabytes, asked.rounds, asked.wire_dtype)
        row = f"{size / 1e6:.1f} MB | {asked.wire_dtype} | {len(whole)} | {statistics.median(whole):.2f} | {max(whole):.2f}"
        print(f"| {row} | {statistics.median(inner):.2f} |", flush=True)


if __name__ == "__main__":
    main()
