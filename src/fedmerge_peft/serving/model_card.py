"""Model cards: what an exported folder says of itself on the hub, in its ``README.md``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmerge_peft.runs.directory import RunDirectory
from fedmerge_peft.serving.merged_adapter import KINDS, MergedAdapter
from fedmerge_peft.util.text import printable

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

_PROJECT = "https://arxiv.org/abs/2504.06768"

_CLIENT = """---
{{ card_data }}
---

# {{ title }}

A LoRA adapter of `{{ base }}` for **{{ name }}**, one of {{ clients }} parties that fine-tuned the model together
without pooling their data ([FedMerge]({{ project }})): θ = Σ_j π_j Θ_j, merged from {{ adapters }} shared adapters.
It is plain PEFT, of rank {{ rank }}.

```python
{{ example }}
```

| | |
|---|---|
| base model | `{{ base }}` |
| method | `{{ method }}` |
| round | {{ round }} |
| merging weights π | {{ weights }} |
{%- for metric, value in scores.items() %}
| {{ metric }}, on this party's own examples | {{ value }} |
{%- endfor %}

## Recipe

```yaml
{{ recipe }}```
"""

_SOUP = """---
{{ card_data }}
---

# {{ title }}

{{ adapters }} LoRA adapters of `{{ base }}` and, in `weights.json`, how each of {{ clients }} parties mixes them
([FedMerge]({{ project }})). A party's adapter is Σ_j π_j Θ_j, tensor by tensor, which is not what PEFT's `add_weighted_adapter`
computes:

```python
{{ example }}
```

| | |
|---|---|
| base model | `{{ base }}` |
| method | `{{ method }}` |
| round | {{ round }} |
| adapters | {{ adapters }}, of rank {{ rank }} |
{%- for metric, value in scores.items() %}
| {{ metric }}, mean over the parties | {{ value }} |
{%- endfor %}

## Recipe

```yaml
{{ recipe }}```
"""

_LOAD = {
    "sequence-classification": """{imports}from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

labels = {labels}
base = AutoModelForSequenceClassification.from_pretrained(
    {base}, num_labels=len(labels), id2label=dict(enumerate(labels)), {options}
)
tokenizer = AutoTokenizer.from_pretrained({processor})
base.config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
{load}
""",
    "causal-lm": """{imports}from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base}, {options})
tokenizer = AutoTokenizer.from_pretrained({processor})
{load}
""",
    "image-classification": """{imports}from peft import PeftModel
from transformers import AutoImageProcessor, AutoModelForImageClassification

labels = {labels}
base = AutoModelForImageClassification.from_pretrained(
    {base}, num_labels=len(labels), id2label=dict(enumerate(labels)), {options}
)
processor = AutoImageProcessor.from_pretrained({processor}, backend="pil")
{load}
""",
}
_CLIENT_LOAD = "model = PeftModel.from_pretrained(base, {place}).eval()"
_SOUP_LOAD = """folder = {place}
weights = json.loads(Path(folder, "weights.json").read_text(encoding="utf-8"))["clients"][{client}]
states = [load_file(f"{{folder}}/adapter-{{number}}/adapter_model.safetensors") for number in range(len(weights))]
model = PeftModel.from_pretrained(base, f"{{folder}}/adapter-0").eval()
merged = {{key: sum(weight * state[key] for weight, state in zip(weights, states)) for key in states[0]}}
set_peft_model_state_dict(model, merged)"""
_SOUP_IMPORTS = """import json
from pathlib import Path

{fetch}from peft import set_peft_model_state_dict
from safetensors.torch import load_file
"""


def client_card(merged: MergedAdapter, base: str, hub_base: str | None, place: str) -> ModelCard:
    """The card of one client's adapter.

    Args:
        merged: The client's.
        base: The base model by the name that others load it by.
        hub_base: The same where it is on the hub; None where it is not.
        place: Where the example loads the adapter from: arguments in Python's syntax.
    """
    run = merged.run
    data = _data(run, hub_base, f"{run.recipe.name}: {merged.name}", merged.scores)
    load = _CLIENT_LOAD.format(place=place)
    return _card(
        _CLIENT, data, run, base,
        name=plain(merged.name),
        title=plain(f"{run.recipe.name}: {merged.name}"),
        weights=", ".join(f"adapter {number}: {weight:.3f}" for number, weight in enumerate(merged.weights.tolist())),
        scores=_scores(merged.scores),
        round=merged.round,
        rank=run.adapter_config["r"],
        adapters=len(merged.soup),
        example=_example(run, base, load, ""),
    )  # fmt: skip


def soup_card(
    run: RunDirectory,
    base: str,
    hub_base: str | None,
    folder: str,
    repo: str | None,
    *,
    adapters: int,
    best: bool,
) -> ModelCard:
    """The card of a whole soup, which is in this folder, or in this repository of the hub; other arguments as for ``client_card``."""
    scores = run.scores(best=best)
    names = dict.fromkeys(metric for each in scores.values() for metric in each)
    means = {
        metric: [each[metric] for each in scores.values() if metric in each] for metric in names
    }
    mean = {metric: math.fsum(values) / len(values) for metric, values in means.items()}
    place = repr(folder) if repo is None else f"snapshot_download({repo!r})"
    load = _SOUP_LOAD.format(place=place, client=repr(run.client_names[0]))
    fetch = "" if repo is None else "from huggingface_hub import snapshot_download\n"
    return _card(
        _SOUP, _data(run, hub_base, f"{run.recipe.name}: soup", {}), run, base,
        title=plain(f"{run.recipe.name}: soup"),
        scores=_scores(mean),
        round=run.round(best=best),
        rank=run.adapter_config["r"],
        adapters=adapters,
        example=_example(run, base, load, _SOUP_IMPORTS.format(fetch=fetch)),
    )  # fmt: skip


def plain(text: str) -> str:
    """A name from somebody's data, as Markdown that shows it as it is."""
    return "".join(
        f"\\{character}" if character in "\\`*_{}[]<>()#+-!|" else character
        for character in printable(text)
    )


def _card(template: str, data: Any, run: RunDirectory, base: str, **said: Any) -> ModelCard:
    from huggingface_hub import ModelCard

    card: ModelCard = ModelCard.from_template(
        data,
        template_str=template,
        base=base,
        method=run.recipe.strategy.name,
        clients=len(run.client_names),
        project=_PROJECT,
        recipe=_recipe(run, base),
        **said,
    )
    return card


def _data(run: RunDirectory, hub_base: str | None, name: str, scores: Mapping[str, float]) -> Any:
    from huggingface_hub import EvalResult, ModelCardData

    kind = KINDS[run.recipe.task.name].pipeline
    results = [
        EvalResult(
            kind,
            dataset_type="private",
            dataset_name=name,
            metric_type=metric.removeprefix("test_"),
            metric_value=value,
        )
        for metric, value in scores.items()
        if metric.startswith("test_") and math.isfinite(value)
    ]
    return ModelCardData(
        base_model=hub_base,
        library_name="peft",
        pipeline_tag=kind,
        tags=["lora", "federated-learning", "model-merging", "fedmerge-peft"],
        model_name=name if results else None,
        eval_results=results or None,
    )


def _scores(scores: Mapping[str, float]) -> dict[str, str]:
    return {metric.replace("_", " "): f"{value:.4g}" for metric, value in scores.items()}


def _example(run: RunDirectory, base: str, load: str, imports: str) -> str:
    recipe, labels = run.recipe, run.task["labels"]
    revision = (
        "" if recipe.backbone.revision is None else f", revision={recipe.backbone.revision!r}"
    )
    tokenizer = recipe.backbone.tokenizer or base
    for_others = base != recipe.backbone.model  # who then cannot have a folder of this machine
    trust = ", trust_remote_code=True" if recipe.backbone.trust_remote_code else ""
    return (
        _LOAD[recipe.task.name]
        .format(
            imports=imports,
            labels=_wrapped(labels),
            base=repr(base),
            options=f'dtype="{recipe.backbone.dtype}"{revision}{trust}',
            processor=repr(_portable(tokenizer) if for_others else tokenizer) + trust,
            load=load,
        )
        .strip()
    )


def _wrapped(labels: Sequence[str]) -> str:
    """A list in Python's syntax, a line for each where it is long."""
    short = repr(list(labels))
    return (
        short
        if len(short) < 100
        else "[\n" + "".join(f"    {label!r},\n" for label in labels) + "]"
    )


def _recipe(run: RunDirectory, base: str) -> str:
    """The run's recipe without what it says of this machine: of local paths, the last part alone."""
    recipe = run.recipe
    backbone = {
        "model": base,
        "tokenizer": recipe.backbone.tokenizer and _portable(recipe.backbone.tokenizer),
    }
    changed = {
        "backbone": recipe.backbone.model_copy(update=backbone),
        "data": recipe.data.model_copy(update={"path": _portable(recipe.data.path)}),
    }
    return recipe.model_copy(update=changed).to_yaml()


def _portable(source: str) -> str:
    path = Path(source)
    return (
        path.name
        if path.is_absolute() or path.exists() or source.startswith(("~", "."))
        else source
    )
