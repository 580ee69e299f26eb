"""Server optimizers: SGD, SGD with momentum, or Adam (FedOpt: Reddi et al. 2021, arXiv 2003.00295).

PyTorch's Adam corrects the bias of both moments, unlike FedOpt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fedmerge_peft.recipe.strategy_base import ServerRecipe
from fedmerge_peft.util.stateful import State, Stateful, checked_copy

_SECOND_MOMENT_DECAY = 0.99
_ADAPTIVITY = 1e-3
"""FedOpt's τ, which Adam adds to the square root of the second moment."""

Gradient = Callable[[slice], Tensor]
"""Function that computes the gradient of Θ in the given w columns, ``(d, w)``."""


class ServerOptimizer(Stateful):
    """Optimizer of the server's rows ``(d, P)`` with the mean of the clients' δ as the gradient.

    Its state consists of the moments, each ``(d, P)``, and of Adam's step counter.
    """

    def __init__(self, recipe: ServerRecipe, rows: Tensor) -> None:
        self._recipe = recipe
        self._rows = nn.Parameter(rows.clone())
        self.optimizer: torch.optim.Optimizer
        if recipe.server_optimizer == "adam":
            self.optimizer = torch.optim.Adam(
                [self._rows],
                lr=recipe.lr,
                betas=(recipe.momentum, _SECOND_MOMENT_DECAY),
                eps=_ADAPTIVITY,
            )
        else:
            self.optimizer = torch.optim.SGD([self._rows], lr=recipe.lr, momentum=recipe.momentum)

    def set_default_momentum(self, momentum: float) -> None:
        """Set the momentum of SGD, unless the recipe sets one."""
        if self._recipe.server_optimizer == "sgd" and self._recipe.server_momentum is None:
            self.optimizer.param_groups[0]["momentum"] = momentum

    def step(self, rows: Tensor, gradient: Tensor) -> Tensor:
        """Return the new rows ``(d, P)``. The argument ``rows`` ``(d, P)`` is not changed."""
        self._rows.data = rows.clone()
        self._rows.grad = gradient.to(rows)
        self.optimizer.step()
        return self._rows.detach().clone()

    def step_columns(self, rows: Tensor, gradient: Gradient, round: int) -> Tensor:
        """Return the new rows ``(d, P)``, as ``step``. The argument ``rows`` is not changed.

        The method has the interface of ``StoredSGD.step_columns``, but computes all columns at once
        and does not use the round.
        """
        return self.step(rows, gradient(slice(None)))

    def repeat(self, adapters: int) -> None:
        """Replace the single row, and its moments, by this many copies."""
        state = self.optimizer.state[self._rows]
        for name, value in state.items():
            if isinstance(value, Tensor) and value.ndim == 2:
                state[name] = value.repeat(adapters, 1)
        self._rows.data = self._rows.data.repeat(adapters, 1)

    def state_dict(self) -> State:
        return dict(self.optimizer.state[self._rows])

    def load_state_dict(self, state: Mapping[str, Tensor | int | None]) -> None:
        counter = torch.zeros(())
        self.optimizer.state[self._rows] = {
            name: checked_copy(name, counter if name == "step" else self._rows.detach(), value)
            for name, value in state.items()
        }
