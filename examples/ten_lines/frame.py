"""From a pandas frame to a report. tickets.csv has the columns organisation, text and queue."""

import pandas as pd

from fedmerge_peft import Recipe, federate, write_report

frame = pd.read_csv("tickets.csv")
task = {"name": "sequence-classification", "label": "queue", "max_length": 64}
data = {"path": "memory", "partition": {"scheme": "natural", "by": "organisation"}}
model = {"model": "sentence-transformers/all-MiniLM-L6-v2"}
recipe = Recipe(name="frame", rounds=4, task=task, data=data, backbone=model, baselines=["local"])
run = federate(recipe, data=frame)
print(run.clients.to_string())
write_report([run], "frame.html")
