"""pfl-research: its simulation with a PEFT model, as in its benchmark of LLMs, if installed."""

from __future__ import annotations

import sys
from types import MethodType


def main(folder: str, rounds: str, address: str) -> None:
    """Run FederatedAveraging over all clients."""
    import torch
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.pytorch import PyTorchTensorDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel
    from programs import adapter, load, new_model, new_optimizer, save_end, set_adapter
    from rivals import Turns

    setting, turns = load(folder), Turns(address)

    def loss(self, **batch):  # type: ignore[no-untyped-def]
        self.train()
        return self(**batch).loss

    model = new_model(setting)
    set_adapter(model, setting.start)
    model.loss, model.metrics = MethodType(loss, model), lambda **_: {}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    class Boundary(TrainingProcessCallback):
        def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):  # type: ignore[no-untyped-def]
            turns.boundary()
            return False, Metrics()

    users = list(range(len(setting.clients)))
    data = FederatedDataset(
        lambda user: PyTorchTensorDataset(dict(setting.clients[user]), user_id=str(user)),
        get_user_sampler("minimize_reuse", users),
    )
    turns.boundary()
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=int(rounds),
            evaluation_frequency=int(rounds),  # in the first round, where metrics do nothing
            train_cohort_size=len(users),
            val_cohort_size=0,
        ),
        SimulatedBackend(data, data, [WeightByDatapoints()]),
        PyTorchModel(
            model,
            lambda _, lr: new_optimizer(trained, setting),
            torch.optim.SGD(trained, lr=1.0),
        ),
        NNTrainHyperParams(
            local_num_epochs=1,
            local_learning_rate=setting.learning_rate,
            local_batch_size=setting.batch_size,
            local_max_grad_norm=1.0,
        ),
        callbacks=[Boundary()],
    )
    save_end(folder, "pfl", adapter(model))


if __name__ == "__main__":
    main(*sys.argv[1:])
