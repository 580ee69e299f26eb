"""How the server steps with what came back: plainly, with momentum, or with Adam (FedOpt: Reddi et al. 2021, arXiv 2003.00295).

Adam is torch's, which corrects the bias of both moments.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedmerge_peft.recipe.strategies import ServerRecipe
from fedmerge_peft.util.stateful import State, Stateful, checked_copy

_SECOND_MOMENT = 0.99
_ADAPTIVITY = 1e-3
"""FedOpt's τ: what Adam adds to the root of the second moment."""


class ServerOptimizer(Stateful):
    """Treats the mean of the clients' δ as a gradient of the server's rows ``(d, P)``. It remembers its moments, ``(d, P)`` each."""

    def __init__(self, recipe: ServerRecipe, rows: Tensor) -> None:
        self._rows = nn.Parameter(rows.clone())
        self.optimizer: torch.optim.Optimizer
        if recipe.server_optimizer == "adam":
            self.optimizer = torch.optim.Adam(
                [self._rows], lr=recipe.lr, betas=(recipe.momentum, _SECOND_MOMENT), eps=_ADAPTIVITY
            )
        else:
            self.optimizer = torch.optim.SGD([self._rows], lr=recipe.lr, momentum=recipe.momentum)

    def step(self, rows: Tensor, gradient: Tensor) -> Tensor:
        """The new rows, ``(d, P)``; the old ones stay as they are."""
        self._rows.data = rows.clone()
        self._rows.grad = gradient.to(rows)
        self.optimizer.step()
        return self._rows.detach().clone()

    def state_dict(self) -> State:
        return dict(self.optimizer.state[self._rows])

    def load_state_dict(self, state: Mapping[str, Tensor | int | None]) -> None:
        counter = torch.zeros(())
        self.optimizer.state[self._rows] = {
            name: checked_copy(name, counter if name == "step" else self._rows.detach(), value)
            for name, value in state.items()
        }
