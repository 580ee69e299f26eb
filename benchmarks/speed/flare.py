"""NVIDIA FLARE's simulator with a PEFT client: the job."""

from __future__ import annotations

import sys
from pathlib import Path


def main(folder: str, rounds: str, address: str) -> None:
    """Run FedAvg in the simulator, with one process for each client, which is the default."""
    import torch
    from flare_server import Persistor
    from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
    from nvflare.recipe import SimEnv
    from programs import load, save_end

    setting = load(folder)
    start = Path.cwd() / "start.pt"  # the format of FLARE's persistor
    torch.save(dict(setting.start), start)
    clients = len(setting.clients)
    recipe = FedAvgRecipe(
        name="peft",
        model_persistor=Persistor(str(start), address),
        min_clients=clients,
        num_rounds=int(rounds),
        train_script=str(Path(__file__).resolve().parent / "flare_client.py"),
        train_args=folder,
    )
    workspace = Path.cwd() / "workspace"
    recipe.execute(SimEnv(num_clients=clients, workspace_root=str(workspace)))
    saved = next(workspace.rglob("FL_global_model.pt"))
    save_end(folder, "flare", torch.load(saved, weights_only=True)["model"])


if __name__ == "__main__":
    main(*sys.argv[1:])
