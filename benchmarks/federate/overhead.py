"""Round times across sites without training: adapters of 1 MB and 100 MB, two sites, TLS, loopback.

Server and sites run as separate processes, as in a real federation. Sites evaluate and train in one
exchange, and both are replaced by constants. The rest of a round remains: merging, messages, TLS,
checks, logs, the update of the soup, and the checkpoint.

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

from transformers import BertConfig, BertModel

from fedmerge_peft import Recipe, Run
from fedmerge_peft.models import tiny
from fedmerge_peft.sites.config import ADDRESS_VARIABLE, KIT_VARIABLE, SOCKETS_VARIABLE
from fedmerge_peft.sites.flare.operator import run
from fedmerge_peft.sites.flare.site_kit import secure_site_kit
from fedmerge_peft.sites.rehearse import await_server, prepare_rehearsal, start_server
from fedmerge_peft.sites.supervisor import ChildProcess, child_environment

WIDTH = 1024
"""Width of the backbone; rank 4096 gives 134 MB."""
PER_RANK = 4 * (2 * 2 * 2 * WIDTH)
"""Bytes per unit of rank: two layers, two modules, two factors."""


def write_backbone(folder):
    """Write the tiny BERT, with two layers of ``WIDTH``."""
    tiny.write("bert", folder)
    BertModel(BertConfig.from_pretrained(folder, hidden_size=WIDTH)).save_pretrained(folder)


def sized_recipe(model, megabytes, rounds):
    """Return the smoke recipe with the rank that gives about this size."""
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
        f"backbone.model={model}",
    ]
    return Recipe.load("smoke", [*small, *rest])


def start_idle_site(out, site):
    """Start FLARE's client and an idle trainer, as ``fedmerge federate site`` does."""
    kit = (out / "sites" / site).resolve()
    secure_site_kit(kit)
    sockets = out / f"sockets-{site}"
    sockets.mkdir(mode=0o700)
    environment = {
        **child_environment(),
        SOCKETS_VARIABLE: str(sockets),
        KIT_VARIABLE: str(kit),
        ADDRESS_VARIABLE: str(out / f"{site}.socket"),
    }
    trainer = [sys.executable, str(Path(__file__).with_name("idle_site.py")), site]
    client = [sys.executable, "-m", "fedmerge_peft.sites.flare.child", "client", str(kit), site]
    return ChildProcess("trainer", trainer, out / f"{site}.out", environment), ChildProcess(
        "connection", client, kit / "site.log", environment
    )


def measure(megabytes, rounds, wire_dtype):
    """Return seconds between checkpoints, seconds in the records, and bytes of an adapter."""
    out = Path(tempfile.mkdtemp(prefix="fedmerge-"))
    children = []
    try:
        write_backbone(out / "model")
        recipe = sized_recipe(out / "model", megabytes, rounds)
        federation = prepare_rehearsal(
            recipe, 2, out / "f", segment=rounds + 1, wire_dtype=wire_dtype
        )
        children.append(start_server(out / "f"))
        for site in federation.sites:
            children += start_idle_site(out / "f", site)
        await_server(federation, children[0])
        outcome = run(
            out / "f" / "operator",
            lambda line: print(line, file=sys.stderr),
            wait=300,
            min_sites=2,
            reconnect_timeout=10,
        )
        if outcome["state"] != "ended":
            raise SystemExit(outcome["error"])
        finished = Run.open(out / "f" / "server" / "run")
        times = [
            path.stat().st_mtime
            for path in sorted((finished.path / "weights").glob("round-*.safetensors"))
        ]
        total = [later - earlier for earlier, later in pairwise(times)]
        return (
            total,
            [record["seconds"] for record in finished.records[1:]],
            4 * finished.soup.layout.size,
        )
    finally:
        for child in reversed(children):
            child.stop()
        shutil.rmtree(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=float, nargs="+", default=[1, 100])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--wire-dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    print(
        "| adapter | wire | rounds | seconds per round, median | longest | messages and update |\n"
        "|---|---|---:|---:|---:|---:|"
    )
    for megabytes in options.megabytes:
        total, recorded, size = measure(megabytes, options.rounds, options.wire_dtype)
        row = f"{size / 1e6:.1f} MB | {options.wire_dtype} | {len(total)}"
        times = f"{statistics.median(total):.2f} | {max(total):.2f}"
        print(f"| {row} | {times} | {statistics.median(recorded):.2f} |", flush=True)


if __name__ == "__main__":
    main()
