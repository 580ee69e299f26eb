"""Three of six clients in each round, with every method."""

import pytest
import torch

from fedmerge_peft import Federation
from fedmerge_peft.adapters.lora_factors import (
    A_SUFFIXES,
    RANDOM_INIT_SUFFIXES,
    layer_factors,
    rank_mask,
    suffix_mask,
)
from fedmerge_peft.recipe.strategies import STRATEGIES
from fedmerge_peft.training.plan import Mixture

CLIENTS = 6
SETTINGS = {
    "fedmerge": "adapters: 2, start: independent",
    "ifca": "adapters: 2",
    "fesem": "adapters: 2",
    "flhc": "adapters: 2, warm_rounds: 1",
    "fedlease": "adapters: 2",
    "fedem": "adapters: 2",
    "femam": "levels: 2",
}


class Half:
    """Two rounds: the state before the second, its replies, and the state after it."""

    def __init__(self, smoke, engine, name):
        recipe = smoke(
            f"strategy={{name: {name}, {SETTINGS.get(name, '')}}}", "clients.fraction=0.5"
        )
        federation = Federation(recipe, engine)
        self.strategy = federation.strategy
        self.layout = engine.backbone.layout
        self.start = engine.strategy_context().fresh_row(0)
        rounds, replies = federation.rounds(lambda reply: replies.append(reply)), []
        first = next(rounds)
        self.before, self.weights = self.strategy.soup.rows.clone(), self.strategy.weights.clone()
        self.earlier = [reply.client for reply in replies]
        replies.clear()
        self.records = [first, next(rounds)]
        self.replies = replies
        self.asked = [reply.client for reply in replies]
        self.never = sorted(set(range(CLIENTS)) - {*self.earlier, *self.asked})
        assert 0 < len(self.never) < 3
        self.rows = self.strategy.soup.rows
        self.whole = torch.ones(self.layout.size, dtype=torch.bool)
        self.head = torch.zeros_like(self.whole)
        self.head[self.layout.columns("head")] = True

    def newcomers_adapter(self, name):
        """The served row by the rule in ``Strategy``, ``(P,)``."""
        if name == "local":
            return self.start
        if name in ("fedmerge", "ifca", "fesem", "flhc", "fedlease"):
            return self.rows.mean(0)
        if name == "fedalt":  # an own half of the start
            rest = rank_mask(self.layout, lambda rank: slice(rank // 2))
            own = rank_mask(self.layout, lambda rank: slice(rank // 2, None))
            known = sorted({*self.earlier, *self.asked})
            expected = self.start.clone()
            expected[rest] = self.rows[known][:, own].mean(0)
            return expected
        if name in ("fedper", "fedrep", "fedsa_lora", "fedpac"):  # the private part of the start
            shared = ~self.head if name != "fedsa_lora" else suffix_mask(self.layout, A_SUFFIXES)
            return torch.where(shared, self.rows[0], self.start)
        return self.rows[0]

    def movable(self, name):
        """Numbers of the soup that the second round may change, ``(d, P)`` bool."""
        allowed = torch.zeros(self.rows.shape, dtype=torch.bool)
        own = torch.tensor(self.asked)
        if name == "local":
            allowed[own] = True
        elif name in ("fedavg_ft", "ditto"):
            allowed[0] = allowed[1 + own] = True
        elif name == "feddpa":
            private = rank_mask(self.layout, lambda rank: slice(rank // 2, None))
            allowed[:] = ~private & ~self.head  # the global half
            allowed[0] |= self.head
            allowed[1 + torch.tensor(self.never)] |= self.head
            allowed[1 + own] = True
        elif name == "fedalt":
            allowed[:] = rank_mask(self.layout, lambda rank: slice(rank // 2))
            allowed[own] = True
        elif name in ("fedper", "fedrep", "fedsa_lora", "fedpac"):  # others are own parts
            allowed[:] = (
                ~self.head if name != "fedsa_lora" else suffix_mask(self.layout, A_SUFFIXES)
            )
        elif name == "ifca":
            allowed[[reply.choice for reply in self.replies]] = True
        elif name in (
            "fesem",
            "flhc",
            "fedlease",
        ):  # a first reply after the clustering moves nothing
            allowed[
                [
                    int(self.strategy.clusters[client])
                    for client in self.asked
                    if client in self.earlier
                ]
            ] = True
        elif name == "femam":  # the first level
            allowed[:] = rank_mask(self.layout, lambda rank: slice(rank // 2)) | self.head
        elif name == "ffa_lora":
            allowed[:] = ~suffix_mask(self.layout, RANDOM_INIT_SUFFIXES)
        elif name == "rolora":
            allowed[:] = suffix_mask(self.layout, A_SUFFIXES) | self.head
        else:
            allowed[:] = True
        return allowed

    def numbers(self, name):
        """Numbers sent down and up for one client, in the first round and in the second."""
        size, head = self.layout.size, int(self.head.sum())
        a, b = (
            sum(part.size for part in side)
            for side in zip(
                *[(layer.a, layer.b) for layer in layer_factors(self.layout)], strict=True
            )
        )
        assert a + b + head == size
        if name == "rolora":  # one of three clients took part in the first round
            down = [size, (b + head + 2 * size) / 3]
            return list(zip(down, (b + head, a + head), strict=True))
        if name == "flora":  # three clients' stacks of the first round go to everyone
            return [(head, size), (3 * (a + b) + head, size)]
        if name == "femam":  # one of three clients took part in the first round
            first = (a + b) // 2 + head
            return [(first, first), ((first + 2 * size) / 3, first)]
        if name == "fedpac":  # centroids down, and two statistics for each of them up
            classes, width = self.layout.classifier.shape
            up = size + 2 * classes * (width + 2)
            return [(size, up), (size + classes * width, up)]
        if name == "fedex_lora":  # and of its sum two stacks are enough
            return [(size, size), (2 * (a + b) + size, size)]
        down, up = {
            "local": (0, 0),
            "ifca": (2 * size, size),
            "fedem": (2 * size, 2 * size),
            "fedper": (a + b, a + b),
            "fedrep": (a + b, a + b),
            "feddpa": ((a + b) // 2 + head, (a + b) // 2 + head),
            "fedalt": ((a + b) // 2, (a + b) // 2),
            "ffa_lora": (b + head, b + head),
            "fedsa_lora": (a, a),
        }.get(name, (size, size))
        return 2 * [(down, up)]


@pytest.mark.parametrize("name", [entry.name for entry in STRATEGIES])
def test_with_half_of_the_clients_a_round(smoke, smoke_engine, name):
    half = Half(smoke, smoke_engine, name)
    for client in half.never:
        served = half.strategy.served(client)
        if name == "fedem":
            assert isinstance(served, Mixture)
            assert torch.equal(served.rows, half.rows)
            assert served.weights.tolist() == [0.5, 0.5]
        else:
            torch.testing.assert_close(served, half.newcomers_adapter(name))
        sent = half.strategy.plan(client).sent
        if name == "ditto":  # and so starts from there
            assert torch.equal(sent, half.rows[:1].repeat(2, 1))
    moved, movable = half.rows != half.before, half.movable(name)
    assert not (moved & ~movable).any()
    assert torch.equal(moved.any(1), movable.any(1))
    others = [client for client in range(CLIENTS) if client not in half.asked]
    assert torch.equal(half.strategy.weights[others], half.weights[others])
    assert [(record.bytes_down, record.bytes_up) for record in half.records] == [
        (3 * 4 * down, 3 * 4 * up) for down, up in half.numbers(name)
    ]
