"""This package's program for the comparisons with other frameworks."""

from __future__ import annotations

import sys
from pathlib import Path


def main(folder: str, rounds: str, address: str) -> None:
    """Run FedAvg without evaluation."""
    import setting
    import workload
    from programs import save_end
    from rivals import Turns

    federation = setting.rounds(workload.engine(Path(folder)))
    records, turns = federation.rounds(), Turns(address)
    turns.boundary()
    for _ in range(int(rounds)):
        next(records)
        turns.boundary()
    soup = federation.strategy.soup
    save_end(folder, "ours", soup.layout.state_dict(soup.rows[0].clone()))


if __name__ == "__main__":
    main(*sys.argv[1:])
