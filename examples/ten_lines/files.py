"""From one CSV file per client to a report. Each file has the columns text and queue."""

from fedmerge_peft import Recipe, federate, write_report

task = {"name": "sequence-classification", "label": "queue", "max_length": 64}
data = {"path": "clients/*.csv", "partition": {"scheme": "natural", "by": "client"}}
model = {"model": "sentence-transformers/all-MiniLM-L6-v2"}
recipe = Recipe(name="files", rounds=4, task=task, data=data, backbone=model, baselines=["local"])
run = federate(recipe)
print(run.clients.to_string())
write_report([run], "files.html")
