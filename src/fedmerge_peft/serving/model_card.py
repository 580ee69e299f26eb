"""Model cards: the ``README.md`` of adapter folders, with metadata for the hub."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fedmerge_peft.adapters.soup import AdapterSoup
from fedmerge_peft.models.pretrained import gguf_source, quantization_options
from fedmerge_peft.runs.directory import RunDirectory
from fedmerge_peft.serving.generation_files import carries_tokenizer, usage_code
from fedmerge_peft.tasks import task_type
from fedmerge_peft.tasks.in_memory import is_passed
from fedmerge_peft.util.text import printable

if TYPE_CHECKING:
    from huggingface_hub import ModelCard
    from torch import Tensor

_PROJECT = "https://arxiv.org/abs/2504.06768"

_CARD = """---
{{ card_data }}
---

# {{ title }}

%s

```python
{{ example }}
```

| | |
|---|---|
| base model | {{ base }} |
{%%- if gguf %%}
| base weights | dequantized from {{ gguf }} to {{ dtype }} |
{%%- endif %%}
{%%- if quantization %%}
| base weights in training | {{ quantization }}, as the code above loads them |
{%%- endif %%}
{%%- if padding %%}
| padding | {{ padding }} |
{%%- endif %%}
| method | `{{ method }}` |
| round | {{ round }} |
%s

<details>
<summary>Recipe of the run</summary>

```yaml
{{ recipe }}```

</details>
"""
"""Card with two gaps: for an introduction, and for further rows of the table."""

_CLIENT = _CARD % (
    """A LoRA adapter of {{ base }} for **{{ name }}**, {{ role }}
([FedMerge]({{ project }})). No client shared its data. The adapter is merged from
{{ adapters }} shared adapter{{ "s" if adapters > 1 }}: θ = Σ_j π_j Θ_j{{ plus_own }}. It is a plain
PEFT adapter of rank {{ rank }}.""",
    """| merging weights π | {{ weights }} |
{%- for part, number in examples.items() %}
| {{ part }} examples | {{ number }} |
{%- endfor %}
{%- for metric, value in scores.items() %}
| {{ metric }}, on this client's own examples | {{ value }} |
{%- endfor %}""",
)

_SOUP = _CARD % (
    """\
{{ adapters }} LoRA adapters of {{ base }}, and the merging weights of {{ clients }} clients in
`weights.json` ([FedMerge]({{ project }})). A client's adapter is Σ_j π_j Θ_j, tensor by tensor.
{%- if own %}
The clients' own parts, such as heads or label priors, are not included. The folder of a single
client (`fedmerge export RUN --client NAME`) has them.
{%- endif %}
PEFT's `add_weighted_adapter` computes something else, so merge as follows:""",
    """| adapters | {{ adapters }}, of rank {{ rank }} |
{%- for metric, value in scores.items() %}
| {{ metric }}, mean over clients | {{ value }} |
{%- endfor %}""",
)

_CLIENT_LOAD = "model = PeftModel.from_pretrained(base, {place}).eval()"
_PASSED_BASE = "base = ...  # the model that the run was given, for example by federate(model=...)"
_SOUP_LOAD = """folder = {place}
weights = json.loads(Path(folder, "weights.json").read_text(encoding="utf-8"))["clients"][{client}]
paths = [f"{{folder}}/adapter-{{j}}/adapter_model.safetensors" for j in range(len(weights))]
states = [load_file(path) for path in paths]
model = PeftModel.from_pretrained(base, f"{{folder}}/adapter-0").eval()
merged = {{
    key: sum(weight * state[key] for weight, state in zip(weights, states)) for key in states[0]
}}
set_peft_model_state_dict(model, merged)"""
_SOUP_IMPORTS = """import json
from pathlib import Path

{fetch}from peft import set_peft_model_state_dict
from safetensors.torch import load_file
"""


_PADDING = {
    "left": 'on the left (`tokenizer.padding_side = "left"`), since outputs depend on the side',
    "none": "none, since outputs depend on it: give texts of one length, or one text at a time",
    "alone": "none, since outputs depend on the other texts of a batch: give one text at a time",
}
"""Advice for models that do not ignore padding on the right, by ``padding`` in ``task.json``."""
_QUANTIZED = {
    "8bit": "quantized to 8 bits with bitsandbytes",
    "4bit": "quantized to 4 bits (NF4) with bitsandbytes",
}
"""Description of quantized weights, by ``backbone.quantization``."""


class Described(Protocol):
    """Facts of an adapter that its card states."""

    @property
    def run(self) -> RunDirectory:
        """Run from whose soup the adapter is merged."""

    @property
    def name(self) -> str:
        """The client's name, or a description of the mixture."""

    @property
    def weights(self) -> Tensor:
        """π, ``(d,)``; sums to 1."""

    @property
    def round(self) -> int:
        """Number of completed rounds after which the soup was saved."""

    @property
    def scores(self) -> Mapping[str, float]:
        """Scores on the client's own examples, by name; empty if there are none."""


def adapter_card(
    adapter: Described,
    place: str,
    base_model_id: str | None = None,
    *,
    role: str,
    examples: Mapping[str, int],
    rank: int,
    own: str | None = None,
) -> ModelCard:
    """Return the card of one adapter that is merged from a run's soup.

    Args:
        adapter: The adapter.
        place: Arguments, in Python syntax, after the model in the card's call of
            ``PeftModel.from_pretrained``.
        base_model_id: Public name of the base model. Default: the recipe's ``backbone.model``.
        role: Relation of the client or the mixture to the run. ``{clients}`` is replaced by the
            number of clients, such as "3 clients".
        examples: Number of examples by kind: ``training``, ``validation``, ``test``.
        rank: The LoRA rank of the adapter.
        own: Name of a part that is added to the merged adapter, such as "the client's own part";
            None if nothing is added.
    """
    run = adapter.run
    base, hub_base = base_model(run, base_model_id)
    title = f"{run.recipe.name}: {adapter.name}"
    count = len(run.client_names)
    shares = enumerate(adapter.weights.tolist())
    return _card(
        _CLIENT, _data(run, hub_base, title, adapter.scores), run, base,
        name=plain(adapter.name),
        title=plain(title),
        role=role.format(clients=f"{count} client{'s' * (count > 1)}"),
        weights=", ".join(f"adapter {number}: {share:.3f}" for number, share in shares),
        adapters=len(adapter.weights),
        scores=_scores(adapter.scores),
        examples=examples,
        round=adapter.round,
        rank=rank,
        plus_own="" if own is None else f", plus {own}",
        example=_example(run, base, _CLIENT_LOAD.format(place=place), place, ""),
    )  # fmt: skip


def soup_card(
    run: RunDirectory,
    base: str,
    hub_base: str | None,
    folder: str,
    repo: str | None,
    *,
    soup: AdapterSoup,
    best: bool,
) -> ModelCard:
    """Return the card of a soup.

    Args:
        run: The run.
        base: Public name of the base model.
        hub_base: Hub id of the base model, or None.
        folder: The folder that the example loads from, unless ``repo`` is given.
        repo: The hub repository that the example loads from.
        soup: The soup.
        best: State the round and the scores of the best state, even if the run serves its last
            round.
    """
    clients = run.scores(best=best).values()
    names = dict.fromkeys(metric for scores in clients for metric in scores)
    values = {
        metric: [scores[metric] for scores in clients if metric in scores] for metric in names
    }
    means = {metric: math.fsum(numbers) / len(numbers) for metric, numbers in values.items()}
    place = repr(folder) if repo is None else f"snapshot_download({repo!r})"
    load = _SOUP_LOAD.format(place=place, client=repr(run.client_names[0]))
    fetch = "" if repo is None else "from huggingface_hub import snapshot_download\n"
    return _card(
        _SOUP, _data(run, hub_base, f"{run.recipe.name}: soup", {}), run, base,
        title=plain(f"{run.recipe.name}: soup"),
        scores=_scores(means),
        round=run.round(best=best),
        rank=run.adapter_config["r"],
        adapters=len(soup),
        own=soup.own is not None,
        example=_example(run, base, load, "folder", _SOUP_IMPORTS.format(fetch=fetch)),
    )  # fmt: skip


def base_model(run: RunDirectory, base_model_id: str | None = None) -> tuple[str, str | None]:
    """Return the base model's name, and its hub id or None.

    The hub id is None for a local folder, and for a model that is generated or that a Python
    program passed.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    name = base_model_id or run.recipe.backbone.model
    try:
        validate_repo_id(name)
    except HFValidationError:
        return name, None
    return name, None if base_model_id is None and Path(name).exists() else name


def plain(text: str) -> str:
    """Escape a name from the data, so that Markdown shows it literally."""
    return "".join(
        f"\\{character}" if character in "\\`*_{}[]<>()#+-!|" else character
        for character in printable(text)
    )


def code_span(text: str) -> str:
    """Return Markdown that shows a text as code, even if the text contains backticks."""
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    inner = f" {text} " if "`" in text else text
    return f"{ticks}{printable(inner)}{ticks}"


def _card(template: str, data: Any, run: RunDirectory, base: str, **fields: Any) -> ModelCard:
    from huggingface_hub import ModelCard

    card: ModelCard = ModelCard.from_template(
        data,
        template_str=template,
        base=code_span(base),
        gguf=(source := gguf_source(run.recipe.backbone)) and code_span(source),
        dtype=run.recipe.backbone.dtype,
        quantization=_QUANTIZED.get(run.recipe.backbone.quantization or ""),
        padding=_PADDING.get(run.task["padding"]),
        method=run.recipe.strategy.name,
        clients=len(run.client_names),
        project=_PROJECT,
        recipe=_recipe(run, base),
        **fields,
    )
    return card


def _data(run: RunDirectory, hub_base: str | None, name: str, scores: Mapping[str, float]) -> Any:
    from huggingface_hub import EvalResult, ModelCardData

    pipeline = task_type(run.recipe.task).pipeline
    results = [
        EvalResult(
            pipeline or run.recipe.task.name,
            dataset_type="private",
            dataset_name=printable(name),
            metric_type=metric.removeprefix("test_"),
            metric_value=value,
        )
        for metric, value in scores.items()
        if metric.startswith("test_") and math.isfinite(value)
    ]
    return ModelCardData(
        base_model=hub_base,
        library_name="peft",
        pipeline_tag=pipeline or None,
        tags=["lora", "federated-learning", "model-merging", "fedmerge-peft"],
        model_name=printable(name) if results else None,
        eval_results=results or None,
    )


def _scores(scores: Mapping[str, float]) -> dict[str, str]:
    return {metric.replace("_", " "): f"{value:.4g}" for metric, value in scores.items()}


def _example(run: RunDirectory, base: str, load: str, place: str, imports: str) -> str:
    """Return Python code that loads an adapter and, if the task generates text, uses it.

    If a Python program passed the model, the code only loads the adapter.

    Args:
        run: The run.
        base: Public name of the base model.
        load: Code that loads the adapter.
        place: Arguments, in Python syntax, from which the exported tokenizer is loaded if the
            folder has one.
        imports: Further imports.
    """
    recipe, labels = run.recipe, run.task["labels"]
    if is_passed(base):
        return f"{imports}from peft import PeftModel\n\n{_PASSED_BASE}\n{load}"
    revision = (
        "" if recipe.backbone.revision is None else f", revision={recipe.backbone.revision!r}"
    )
    tokenizer = recipe.backbone.tokenizer or base
    public = base != recipe.backbone.model  # then no local path may appear
    gguf = "" if recipe.backbone.gguf_file is None else f", gguf_file={recipe.backbone.gguf_file!r}"
    trust = ", trust_remote_code=True" if recipe.backbone.trust_remote_code else ""
    processor = repr(_portable(tokenizer) if public else tokenizer)
    processor += gguf if tokenizer == base else ""
    heads = run.adapter_config.get("modules_to_save") if task_type(recipe.task).heads else None
    quantized = quantization_options(recipe.backbone, sorted(set(heads or ())))
    quantization = "" if not quantized else f", quantization_config={_lines(quantized)}"
    loading = task_type(recipe.task).loading_code.format(
        imports=imports,
        labels=_wrapped(labels),
        base=repr(base),
        options=f'dtype="{recipe.backbone.dtype}"{revision}{gguf}{trust}{quantization}',
        processor=(place if carries_tokenizer(run) else processor) + trust,
        load=load,
    )
    return (loading + usage_code(run)).strip()


def _lines(options: Mapping[str, Any]) -> str:
    """Return a dictionary in Python syntax, with one line per entry."""
    return "{\n" + "".join(f"    {key!r}: {value!r},\n" for key, value in options.items()) + "}"


def _wrapped(labels: Sequence[str]) -> str:
    """Return a list in Python syntax; a long one has one line per item."""
    short = repr(list(labels))
    return (
        short
        if len(short) < 100
        else "[\n" + "".join(f"    {label!r},\n" for label in labels) + "]"
    )


def _recipe(run: RunDirectory, base: str) -> str:
    """Return the run's recipe as YAML, with ``base`` as its model.

    Local paths of the tokenizer and of the data are reduced to their last part.
    """
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
