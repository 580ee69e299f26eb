"""Draw the README's figure of merging weights, from a finished run of quickstart.

python docs/images/weights.py [RUN]
"""

from __future__ import annotations

import sys
from pathlib import Path

from fedmerge_peft import Run, load_run
from fedmerge_peft.plotting.render import draw
from fedmerge_peft.plotting.specs import Heat

HERE = Path(__file__).parent


def picture(run: Run) -> Heat:
    """Return π after the last round, with the clients ordered and labeled by group."""
    clients = run.clients.sort_values("group", kind="stable")
    weights = run.weights.loc[clients.index]
    rows = [f"{name} · {group}" for name, group in clients["group"].items()]
    columns = [str(column) for column in weights.columns]
    return Heat(
        weights.to_numpy(),
        rows,
        columns,
        x="adapter (number)",
        label="weight π (share of the client)",
    )


def main() -> None:
    """Write weights.png to the folder of this program."""
    run = load_run(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart")
    figure = draw(picture(run), "Merging weights that the quickstart learned")
    figure.savefig(HERE / "weights.png", dpi=120)


if __name__ == "__main__":
    main()
