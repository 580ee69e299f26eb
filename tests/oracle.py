"""Local training in plain PEFT and torch, with separate tensors.

The training loop must give the same result: flat rows, shared passes and caches change nothing.
"""

import math

import torch

from fedmerge_peft.training.optimization import count_steps, micro_batches
from fedmerge_peft.training.plan import Trained
from fedmerge_peft.util.seeds import derive, seeded


def train_plainly(runtime, training, job):
    """Train one adapter; returns ``Trained``."""
    backbone, plan = runtime.backbone, job.train
    model, layout = backbone.model, backbone.layout
    backbone.load_row(plan.row)
    parameters = list(backbone.trainable)
    for parameter in parameters:
        parameter.grad.zero_()
    anchor = layout_parts(layout, plan.row if plan.anchor is None else plan.anchor)
    proximal = training.proximal if plan.proximal is None else plan.proximal
    weights = {}
    if plan.example_weights is not None:
        weights = dict(zip(job.indices.tolist(), plan.example_weights.tolist(), strict=True))
    losses = []
    backbone.train()
    with seeded(derive(job.seed, "dropout")):
        for phase, mask in enumerate(plan.phases):
            masks = None if mask is None else layout_parts(layout, mask)
            optimizer = plain_optimizer(parameters, training)
            total = count_steps(len(job.indices), training)
            for number, step in enumerate(micro_batches(job.indices, training, job.seed, phase)):
                for group in optimizer.param_groups:
                    group["lr"] = training.learning_rate * rate(training, number, total)
                losses.append(backward(runtime, model, step, weights))
                if proximal:
                    for parameter, near in zip(parameters, anchor, strict=True):
                        parameter.grad.add_(2 * proximal * (parameter.detach() - near))
                if masks is not None:
                    for parameter, keep in zip(parameters, masks, strict=True):
                        parameter.grad.mul_(keep)
                if training.max_grad_norm is not None:
                    torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
                before = [parameter.detach().clone() for parameter in parameters]
                optimizer.step()
                if masks is not None:  # weight decay moves everything
                    for parameter, old, keep in zip(parameters, before, masks, strict=True):
                        parameter.data.copy_(torch.where(keep, parameter.data, old))
                for parameter in parameters:
                    parameter.grad.zero_()
    backbone.eval()
    return Trained(backbone.row(), float(torch.stack(losses).mean()), len(losses))


def layout_parts(layout, row):
    """The separate tensors of a row, in the order of the layout."""
    return [row[entry.columns].view(entry.shape) for entry in layout.entries]


def plain_optimizer(parameters, training):
    if training.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters, lr=training.learning_rate, weight_decay=training.weight_decay
        )
    return torch.optim.SGD(
        parameters,
        lr=training.learning_rate,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
    )


def rate(training, step, total):
    """Factor of the learning rate at a step, by the formulas of the schedules."""
    warm = math.ceil(training.warmup * total)
    if step < warm:
        return step / max(1, warm)
    progress = (step - warm) / max(1, total - warm)
    if training.schedule == "linear":
        return max(0.0, 1 - progress)
    if training.schedule == "cosine":
        return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
    return 1.0


def backward(runtime, model, step, weights):
    """Add the gradient of the step's mean loss over all of its terms."""
    batches = [(chunk, runtime.task.collate(runtime.examples, chunk)) for chunk in step]
    count = sum(runtime.task.count_terms(batch["labels"]) for _, batch in batches)
    total = 0.0
    for chunk, batch in batches:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        with runtime.accelerator.autocast():
            logits = model(**inputs).logits
        losses = runtime.task.losses(logits, batch["labels"])[0]
        if weights:
            losses = losses * torch.tensor([weights[row] for row in chunk.tolist()]).to(losses)
        (losses.sum() / count).backward()
        total = total + losses.sum().detach() / count
    return total
