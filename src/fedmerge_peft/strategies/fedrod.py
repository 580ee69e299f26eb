"""Fed-RoD: a generic head that is trained with a balanced loss, and personal heads beside it.

Source: Chen & Chao 2022, arXiv 2107.00778.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedmerge_peft.adapters.soup import OwnParts
from fedmerge_peft.errors import RecipeError
from fedmerge_peft.recipe import strategies as recipes
from fedmerge_peft.strategies.base import Reply, StrategyContext
from fedmerge_peft.strategies.fedavg import FedAvg
from fedmerge_peft.training.plan import InTurn, Plan, Train


class FedRoD(FedAvg):
    """Sum of the logits of a generic and a personal linear head on the same features f:

        z_i(x) = (G + P_i) f(x; φ)

    In each round a client trains, one after the other,

        (φ, G) on CE(G f(x; φ) + log n_i),    P_i on CE((G + P_i) f(x; φ)) with φ and G as sent

    where n_i are the client's label counts (balanced softmax, ``training.logits: adjusted``). φ and
    G are averaged as in FedAvg. P_i starts at zero and stays at the client. The heads are linear,
    so G + P_i is one head. A client's adapter is therefore the global adapter with P_i added to the
    weight and the bias of the head's last layer. Other layers of the head belong to φ.

    Differences from the paper:

    - In the paper, P_i trains in the same steps as φ and G, while the features change. Here it
      trains on the features of φ as sent.
    - P_i has free parameters. The paper also has a variant with a hypernetwork.
    """

    state_fields = (*FedAvg.state_fields, "personal")

    def __init__(self, recipe: recipes.FedRoDRecipe, context: StrategyContext) -> None:
        super().__init__(recipe, context)
        if context.layout.classifier is None:
            raise RecipeError(
                "strategy.name: fedrod adds personal heads to a head, but this adapter has "
                "none; name one in lora.modules_to_save"
            )
        self.head = torch.zeros(context.layout.size, dtype=torch.bool)
        """Columns of the head's last layer, a mask ``(P,)``."""
        for entry in (context.layout.classifier, context.layout.classifier_bias):
            if entry is not None:
                self.head[entry.columns] = True
        self.personal = torch.zeros(context.clients, int(self.head.sum()))
        """P_i, ``(m, P_h)``."""
        self._store_personal_heads()

    def _store_personal_heads(self) -> None:
        self.soup.own = OwnParts(torch.nonzero(self.head).flatten(), self.personal)

    def load_state_dict(self, state: Mapping[str, Tensor | int | None]) -> None:
        super().load_state_dict(state)
        self._store_personal_heads()

    def adapter(self, client: int) -> Tensor:
        row = self.soup.rows[0].clone()
        row[self.head] += self.personal[client]
        return row

    def plan(self, client: int) -> Plan:
        generic = Train(self.soup.rows[0].clone(), logits="adjusted")
        personal = Train(self.adapter(client), phases=(self.head,), logits="plain")
        return InTurn((generic, personal))

    def update(self, replies: Iterable[Reply]) -> None:
        replies = list(replies)
        super().update(replies)
        for reply in replies:
            self.personal[reply.client] -= reply.deltas[1, self.head]
