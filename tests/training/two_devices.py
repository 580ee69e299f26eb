"""Train a tiny model on two devices without data, and print the devices of the results.

The second device, ``second:0``, exists in this process only. Tensors have shapes and devices, but
no values (``FakeTensorMode``): an operation on tensors of different devices is an error.

    python two_devices.py FOLDER {bert,llama}
"""

import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_module
from peft.tuners.lora.layer import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from fedmerge_peft.models.adapter_slot import AdapterSlot
from fedmerge_peft.models.adapter_stack import AdapterStack
from fedmerge_peft.models.backbone import Backbone
from fedmerge_peft.models.labeled_head import LabeledHead, frozen_output_layer
from fedmerge_peft.training.gradients import accumulate
from fedmerge_peft.training.plan import Alignment
from fedmerge_peft.training.runtime import Runtime

sys.path.insert(0, str(Path(__file__).parents[1]))
from training.bench import Bench

SECOND = "second:0"
PARTS = {
    "bert": {
        "bert.embeddings": "cpu",
        "bert.encoder.layer.0": "cpu",
        "bert.encoder.layer.1": SECOND,
        "bert.pooler": SECOND,
        "dropout": SECOND,
        "classifier": "cpu",
    },
    "llama": {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": SECOND,
        "model.norm": SECOND,
        "lm_head": SECOND,
    },
}


def moved(tensor, device):
    """Return a tensor without data on a device."""
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    if not isinstance(tensor, torch.nn.Parameter):
        return empty
    return torch.nn.Parameter(empty, tensor.requires_grad)


def place(model, parts):
    """Replace the tensors of a PEFT model by tensors without data, and attach Accelerate's hooks.

    PEFT's own modules have no hooks, because it adds them after the model is loaded.
    """
    base = model.get_base_model()
    new = {}
    for name, module in base.named_modules():
        own = [where for part, where in parts.items() if f"{name}.".startswith(f"{part}.")]
        device = own[0] if own else "cpu"
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is not None:
                    tensors[key] = new.setdefault(id(tensor), moved(tensor, device))
    dispatch_model(base, parts, main_device="cpu")
    for module in base.modules():
        if isinstance(module, LoraLayer | ModulesToSaveWrapper):
            remove_hook_from_module(module)
        if isinstance(module, LoraLayer):
            for factors in (module.lora_A, module.lora_B):
                remove_hook_from_module(factors["default"])


folder, kind = Path(sys.argv[1]), sys.argv[2]
bench = Bench(folder, kind)
held = bench.backbone
held.model.config.use_cache = False
# Tensors without values have no numbers of terms, and no positions of labels.
bench.task.count_terms = len
if kind == "llama":
    bench.task.training_losses = lambda logits, labels, weights: (
        logits[:, 0].sum(dim=1) + labels[:, 0]
    )
_setup_privateuseone_for_python_backend("second")
with FakeTensorMode(allow_non_fake_inputs=True):
    place(held.model, PARTS[kind])
    trainable = [tensor for tensor in held.model.parameters() if tensor.requires_grad]
    backbone = Backbone(held.model, held.layout, trainable, {}, torch.device("cpu"), "")
    runtime = Runtime(backbone, bench.task, bench.accelerator, bench.examples)
    rows, alignment = np.arange(4), Alignment(torch.zeros(3, 32), 0.1)
    for adapters in (
        AdapterSlot(backbone, torch.zeros(backbone.layout.size)),
        AdapterStack(backbone, torch.zeros(2, backbone.layout.size)),
    ):
        alignments = [alignment if kind == "bert" else None] * len(adapters)
        with adapters.applied():
            losses = accumulate(runtime, adapters, [[rows]] * len(adapters), alignments=alignments)
        print(type(adapters).__name__, losses.device, adapters.gradient.device)
    layer = frozen_output_layer(backbone.model)
    if layer is not None:
        head, ids = LabeledHead(layer), torch.zeros(4, 6, dtype=torch.long)
        with head.set_aside(torch.arange(4)) as kept:
            bench.task.forward(backbone.model, {"input_ids": ids})
        losses = head.losses(kept[0].flatten(0, 1), ids.flatten())
        losses.sum().backward()
        print(type(head).__name__, kept[0].device, losses.device)
    print("devices", *sorted({str(tensor.device) for tensor in trainable}))
