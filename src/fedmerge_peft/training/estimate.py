"""Memory of a run and bytes on the wire, computed from the recipe and the model's configuration.

A training step and an evaluation batch run on tensors without data (``FakeTensorMode``). The memory
of a pass is the largest total size of the tensors that exist at the same time. It includes
activations, their gradients, logits and temporary tensors, but not the weights and their gradients.
No weights are read.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedmerge_peft.errors import BackboneError, RecipeError
from fedmerge_peft.models.gguf import gguf_config
from fedmerge_peft.models.labeled_head import LabeledHead, frozen_output_layer
from fedmerge_peft.models.peft_model import add_adapter, prepare_heads
from fedmerge_peft.models.pretrained import gguf_location, model_folder
from fedmerge_peft.models.quiet import quiet_transformers
from fedmerge_peft.recipe.backbone import BackboneRecipe
from fedmerge_peft.recipe.schema import TrainingRecipe
from fedmerge_peft.tasks import Task, task_type
from fedmerge_peft.tasks.base import Batch
from fedmerge_peft.tasks.tokenization import load_pretrained
from fedmerge_peft.tasks.vocabulary import position_limit
from fedmerge_peft.training.batching import requested_clients
from fedmerge_peft.training.optimization import mixes_rows
from fedmerge_peft.util.library_errors import library_errors

if TYPE_CHECKING:
    from fedmerge_peft.recipe.schema import Recipe

FLOAT32 = 4
"""Bytes of one parameter of an adapter."""
_LONGEST = 1024
"""Number of tokens that are assumed for an example if ``task.max_length`` is not set. A smaller
limit of the model takes precedence."""
_BLOCK, _DOUBLE_BLOCK = 64, 256
"""Number of weights that share a scale in 4-bit quantization, and number of these scales that share
a second scale in double quantization (QLoRA, arXiv 2305.14314)."""


@dataclass(frozen=True)
class Estimate:
    """Memory of a run on the device, in bytes, and the numbers that determine it."""

    parameters: int
    """Number of the backbone's parameters."""
    adapter: int
    """P, the number of parameters of an adapter."""
    clients: int
    """K, the number of clients in a training pass."""
    batch: int
    """Examples of each client in a training pass."""
    evaluation_batch: int
    """Examples in an evaluation pass."""
    length: int
    """Tokens of an example or, if it consists of several sequences, of each of them."""
    backbone: int
    """Frozen weights and buffers."""
    adapters: int
    """Parameters, gradients and optimizer state of K adapters and, if K > 1, the model's own."""
    training: int
    """Further memory of a training step: activations, logits, temporary tensors."""
    evaluation: int
    """Further memory of an evaluation batch."""

    @property
    def total(self) -> int:
        """Peak memory on the device."""
        return self.backbone + self.adapters + max(self.training, self.evaluation)

    @property
    def wire(self) -> int:
        """Bytes of one adapter, which a client receives or returns."""
        return FLOAT32 * self.adapter


def load_config(backbone: BackboneRecipe) -> Any:
    """Load the configuration of the model. For a GGUF file, read it from the file's metadata.

    Raises:
        BackboneError: The configuration cannot be loaded.
    """
    from transformers import AutoConfig

    if located := gguf_location(backbone):
        return gguf_config(*located)
    with TemporaryDirectory(prefix="fedmerge-") as scratch:
        folder = model_folder(backbone, Path(scratch))
        return load_pretrained(AutoConfig, folder, backbone, backbone.revision)


def expected_device(recipe: Recipe) -> str:
    """Return the type of the recipe's device. ``auto`` is resolved for this machine.

    For quantized weights, ``auto`` is cuda, because such a run is usually meant for a GPU of
    another machine.
    """
    if recipe.training.device == "auto":
        for_gpu = recipe.backbone.quantization is not None or torch.cuda.is_available()
        return "cuda" if for_gpu else "cpu"
    return recipe.training.device.partition(":")[0]


def estimate(
    recipe: Recipe,
    config: Any,
    *,
    length: int | None = None,
    device: str = "cpu",
    clients: int | None = None,
) -> Estimate:
    """Estimate the memory of a run.

    The estimate assumes that every example has ``length`` tokens. For language models, it also
    assumes that every token but the first has a loss. It does not include the frozen prefix's cache
    (``training.prefix_cache``), the allocator's fragmentation or the libraries themselves.

    Args:
        recipe: Recipe whose task reads texts.
        config: Configuration of the model.
        length: Tokens of an example. Default: ``task.max_length``, or the smaller of 1024 and the
            model's limit.
        device: Type of device, such as cuda, on which settings with the value ``auto`` depend.
        clients: Clients in a training pass. Default: the recipe's number, or 1 for 8-bit weights
            and DoRA.

    Raises:
        RecipeError: The task does not read texts, or the model does not run without data.
        BackboneError: The model or the adapter is not supported.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    training, section = recipe.training, recipe.task.of_one_sequence()
    task: Task = object.__new__(task_type(section))  # without a tokenizer

    def unknown(reason: str) -> RecipeError:
        return RecipeError(
            f"task: memory cannot be estimated for {recipe.task.name} with this model: {reason}; "
            "start a run with rounds=1 and measure its memory"
        )

    if recipe.task.media_column is not None:
        raise RecipeError(
            f"task: memory cannot be estimated for {recipe.task.name}, because its examples are "
            "not texts; start a run with rounds=1 and measure its memory"
        )
    if length is None:
        limits = (getattr(recipe.task, "max_length", None), position_limit(config), _LONGEST)
        length = limits[0] or min(limit for limit in limits[1:] if limit is not None)
    shareable = recipe.backbone.quantization != "8bit" and not recipe.lora.use_dora
    on_several = recipe.backbone.device_map is not None and device == "cuda"
    large = recipe.backbone.quantization is not None or on_several
    if clients is None:
        clients = requested_clients(training, device, large=large) if shareable else 1
    with quiet_transformers(), torch.device("meta"):
        base, peft = _model(recipe, config, task)
    with FakeTensorMode(), quiet_transformers(), library_errors(unknown):
        _replace_tensors(peft)
        parts = {id(tensor) for tensor in base.parameters() if tensor.requires_grad}
        size = sum(tensor.numel() for tensor in base.parameters() if tensor.requires_grad)
        frozen = [tensor for tensor in base.parameters() if id(tensor) not in parts]
        weights, transient = _weight_bytes(base, frozen, recipe.backbone)
        precision = _autocast(training, device)
        batch = recipe.evaluation.batch_size
        trained = recipe.task.sequences * clients * training.batch_size
        step = _pass(peft, task, trained, length, precision, train=True)
        scores = _pass(peft, task, recipe.task.sequences * batch, length, precision, train=False)
    return Estimate(
        parameters=sum(tensor.numel() for tensor in frozen),
        adapter=size,
        clients=clients,
        batch=training.batch_size,
        evaluation_batch=batch,
        length=length,
        backbone=weights,
        adapters=int(FLOAT32 * size * _rows(training, clients)),
        training=step + transient,
        evaluation=scores + transient,
    )


def _model(recipe: Recipe, config: Any, task: Task) -> tuple[nn.Module, Any]:
    """Return the base model and its PEFT model, on the meta device."""
    import transformers

    backbone = recipe.backbone
    count = recipe.task.label_limit or 2
    task.labels = [str(label) for label in range(count)] if recipe.task.label_column else []
    options = {} if backbone.attention is None else {"attn_implementation": backbone.attention}
    with library_errors(
        lambda reason: BackboneError(
            f"backbone.model: {backbone.model} cannot be built: {reason}; choose another model"
            f"{'' if backbone.attention is None else ' or another backbone.attention'}"
        )
    ):
        for name, value in {"num_labels": max(len(task.labels), 1), **task.config_options}.items():
            setattr(config, name, value)
        model = getattr(transformers, task.auto_model).from_config(
            config, dtype=getattr(torch, backbone.dtype), **options
        )
    peft = add_adapter(model, recipe.lora, task, backbone.model, set())
    if backbone.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()
    prepare_heads(peft, set(), task.heads)
    return model, peft


def _replace_tensors(model: nn.Module) -> None:
    """Replace tensors on the meta device by tensors without data on the CPU.

    On the meta device, attention would use a different kernel than on a CPU or GPU.
    """
    made: dict[int, Any] = {}  # modules may share tensors

    def replaced(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            new = torch.empty(tensor.shape, dtype=tensor.dtype)
            learned = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if learned else new
        return made[id(tensor)]  # type: ignore[no-any-return]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = replaced(tensor)  # type: ignore[assignment]


def _rows(training: TrainingRecipe, clients: int) -> float:
    """Return the number of float32 vectors ``(P,)`` on the device: parameters, gradients, states.

    The model's own adapter has parameters and a gradient, and a single client trains it. Each of
    several clients has a row, a gradient, and a copy of the gradient while gradients are added. In
    8 bits, each of AdamW's two moments counts as a quarter of a vector.
    """
    if training.optimizer == "sgd":
        states = float(training.momentum > 0)
    else:
        states = 0.5 if mixes_rows(training.optimizer) else 2
    slot = 2
    return slot + states if clients == 1 else slot + clients * (3 + states)


def _weight_bytes(
    model: nn.Module, frozen: Iterable[Tensor], backbone: BackboneRecipe
) -> tuple[int, int]:
    """Return the bytes of frozen weights and buffers, and of the largest dequantized weight."""
    stored = {id(tensor): tensor.numel() * tensor.element_size() for tensor in frozen}
    largest = 0
    if backbone.quantization is not None:
        output = getattr(model, "get_output_embeddings", lambda: None)()
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, nn.Linear) and module is not output and id(weight) in stored:
                stored[id(weight)] = _quantized_bytes(module.weight, backbone)
                largest = max(largest, 2 * module.weight.numel())  # bfloat16
    buffers = sum(tensor.numel() * tensor.element_size() for tensor in model.buffers())
    return sum(stored.values()) + buffers, largest


def _quantized_bytes(weight: Tensor, backbone: BackboneRecipe) -> int:
    """Return the bytes of a quantized weight with its scales.

    With 8 bits, each row has a scale of 32 bits. With 4 bits, each block of 64 weights has a scale
    of 32 bits. Double quantization stores the scales of blocks in 8 bits, and adds a scale of 32
    bits for each 256 of them.
    """
    numbers = weight.numel()
    if backbone.quantization == "8bit":
        return numbers + FLOAT32 * len(weight)
    scales = numbers / _BLOCK
    scale_bytes = 1 + FLOAT32 / _DOUBLE_BLOCK if backbone.double_quantization else FLOAT32
    return int(numbers / 2 + scales * scale_bytes)


def _autocast(training: TrainingRecipe, device: str) -> torch.dtype | None:
    """Return the dtype of autocast on a device; None without autocast."""
    chosen = training.mixed_precision
    if chosen == "auto":
        chosen = "bf16" if device == "cuda" else "no"
    return {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[chosen]


def _pass(
    model: Any, task: Task, batch: int, length: int, dtype: torch.dtype | None, *, train: bool
) -> int:
    """Return the peak memory of a pass on a batch in bytes, without weights and their gradients."""
    model.train(train)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    known = [*model.parameters(), *model.buffers()]
    known += [parameter.grad for parameter in known if parameter.grad is not None]
    ids = torch.zeros(batch, length, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    autocast = torch.autocast("cpu", dtype=dtype, enabled=dtype is not None)
    with autocast, torch.no_grad():
        head = _head(model, task, inputs) if train else None
    with torch.set_grad_enabled(train), _peak_of_storages(known) as peak:
        with autocast:
            if head is not None and head.in_chunks(batch * (length - 1)):
                with head.set_aside(torch.arange(batch)) as kept:
                    task.forward(model, inputs)
                logits = head.losses(kept.pop()[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            else:
                logits = task.forward(model, inputs)
        if train:
            _losses(logits, ids).sum().backward()  # type: ignore[no-untyped-call]
        else:
            _losses(logits, ids)
            logits.argmax(dim=-1)
    return peak.bytes


def _head(model: Any, task: Task, inputs: Batch) -> LabeledHead | None:
    """Return the head that may compute losses in chunks; None if model or task does not allow it.

    Unlike the trial in ``training/labeled_head.py``, this function compares no values, because the
    tensors have no data.
    """
    layer = frozen_output_layer(model)
    if layer is None or task.token_targets(inputs["input_ids"]) is None:
        return None
    head, outputs = LabeledHead(layer), []
    handle = layer.register_forward_hook(lambda _, __, output: outputs.append(output))
    logits = task.forward(model, inputs)
    handle.remove()
    head.unchanged = any(output is logits for output in outputs)
    return head


def _losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the losses of a batch; if each token has a row of logits, of all tokens but the first.

    Logits of one dimension are already losses (``LabeledHead.losses``).

    The losses are cross-entropies, whatever the task. The task's own losses may depend on the
    values of the labels, but the tensors have no data.
    """
    if logits.ndim == 1:
        return logits
    if logits.ndim == 2 or logits.shape[:2] != ids.shape:
        return functional.log_softmax(logits.float(), dim=-1)[..., 0]
    selected = logits[:, :-1].flatten(0, 1).float()
    return functional.cross_entropy(selected, ids[:, 1:].flatten(), reduction="none")


class _Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Peak of the total size of the storages that exist at the same time."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive = {tensor.untyped_storage()._cdata for tensor in known}
        self._now = self.bytes = 0

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        output = operator(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return output

    def _add(self, storage: Any) -> None:
        if storage._cdata in self._alive:
            return
        self._alive.add(storage._cdata)
        self._now += storage.nbytes()
        self.bytes = max(self.bytes, self._now)
        weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())

    def _remove(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self._now -= size


@contextmanager
def _peak_of_storages(known: Iterable[Tensor]) -> Iterator[_Peak]:
    """Measure storages that are created inside the context, except storages of known tensors."""
    peak = _Peak(known)
    with peak:
        yield peak
