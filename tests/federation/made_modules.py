"""Modules of a program, without transformers."""

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(16, 16)

    def forward(self, states):
        return torch.relu(self.dense(states))


class TextNet(nn.Module):
    """Mean of embeddings, one layer, a head with a name of its own."""

    def __init__(self, labels=2, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(400, 16)
            self.layers = nn.ModuleList([Block(), Block()])
            self.out = nn.Linear(16, labels)

    def forward(self, input_ids, attention_mask):
        mask = attention_mask[..., None]
        states = (self.embed(input_ids) * mask).sum(1) / mask.sum(1)
        for layer in self.layers:
            states = layer(states=states)  # a prefix cache would look for hidden_states
        return self.out(states)


class ImageNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU())
        self.classifier = nn.Linear(8, 2)

    def forward(self, pixel_values):
        return {"logits": self.classifier(self.body(pixel_values))}


class NextToken(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(400, 16)
        self.mix = nn.Linear(16, 16)
        self.lm_head = nn.Linear(16, 400)

    def forward(self, input_ids, attention_mask):
        return self.lm_head(torch.relu(self.mix(self.embed(input_ids))))
