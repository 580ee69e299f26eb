"""Pretrain a small ViT on images of CIFAR-100 that the federation does not use, on the CPU.

    python benchmarks/quality/pretrain_vision.py --data DATA

The saved model has no head: every federated run initializes its own. The number of steps is fixed,
so that the model depends on the processor only by rounding. Ledgers hold a digest of the model, and
the runs of a setting must have the same one.
"""

from __future__ import annotations

import argparse
import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

HERE = Path(__file__).resolve().parent
SIZE = 32
BFLOAT16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
"""True if the processor computes in bfloat16, which is about twice as fast."""
WARMUP = 0.1
"""Fraction of the steps over which the learning rate rises."""


def read(path: Path, rows: int | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Read pixels in [0, 1], ``(images, 3, 32, 32)``, and labels, by split."""
    table = pq.read_table(path, columns=["split", "image_png", "fine_label"])
    table = table.take(np.random.default_rng(0).permutation(len(table))[:rows])
    images = [
        np.asarray(Image.open(io.BytesIO(png.as_py())).convert("RGB")) for png in table["image_png"]
    ]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
    labels = torch.from_numpy(table["fine_label"].to_numpy().astype(np.int64))
    split = table["split"].to_numpy()
    return {name: (pixels[split == name], labels[split == name]) for name in ("train", "test")}


def augment(images: Tensor) -> Tensor:
    """Flip, enlarge (by up to a quarter) and shift (by up to an eighth) each image at random."""
    count = len(images)
    scale = 0.8 + 0.2 * torch.rand(count)
    mirror = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    across, down = (2 * torch.rand(2, count) - 1) * (1 - scale + 0.25)
    zero = torch.zeros(count)
    maps = torch.stack(
        [
            torch.stack([scale * mirror, zero, across], dim=1),
            torch.stack([zero, scale, down], dim=1),
        ],
        dim=1,
    )
    return functional.grid_sample(
        images,
        functional.affine_grid(maps, list(images.shape), align_corners=False),
        align_corners=False,
    )


@torch.no_grad()
def accuracy(model: ViTForImageClassification, images: Tensor, labels: Tensor) -> float:
    model.eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
        predicted = torch.cat(
            [model(pixel_values=part).logits.argmax(dim=1) for part in images.split(250)]
        )
    return float((predicted == labels).float().mean())


def fit(
    model: nn.Module,
    count: int,
    batch_size: int,
    loss_of: Callable[[Tensor], Tensor],
    steps: int,
    learning_rate: float = 1e-3,
) -> None:
    """Train for a number of steps, with a warmup and half a cosine of the learning rate.

    Muon (Jordan et al. 2024) trains the matrices of the layers; it learns about twice as fast as
    AdamW. Its bfloat16 products are slow on processors that do not compute in bfloat16, where AdamW
    trains the matrices as well. AdamW trains all other parameters (embeddings, norms, biases,
    heads).

    Args:
        model: The model; its first ModuleList is the stack of layers.
        count: Number of examples.
        batch_size: Examples of a step.
        loss_of: Returns the loss of these rows; called under autocast.
        steps: Number of steps.
        learning_rate: Peak learning rate of AdamW.
    """
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    matrices = [parameter for parameter in layers.parameters() if parameter.ndim == 2]
    rest = [
        parameter
        for parameter in model.parameters()
        if all(parameter is not matrix for matrix in matrices)
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.05)
        if BFLOAT16
        else torch.optim.AdamW(matrices, lr=learning_rate, weight_decay=0.05, betas=(0.9, 0.98)),
        torch.optim.AdamW(rest, lr=learning_rate, weight_decay=0.05, betas=(0.9, 0.98)),
    ]
    warmup = WARMUP * steps
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: (
                step / warmup
                if step < warmup
                else 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup))
            ),
        )
        for optimizer in optimizers
    ]
    model.train()
    batches: list[Tensor] = []
    for step in range(1, steps + 1):
        batches = batches or list(torch.randperm(count).split(batch_size))
        with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
            loss = loss_of(batches.pop())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        if step % 100 == 0:
            print(f"step {step:5d}  loss {loss.item():.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the data files")
    parser.add_argument(
        "--out", type=Path, default=HERE / "models" / "vision", help="folder for the model"
    )
    parser.add_argument("--steps", type=int, default=2500, help="training steps")
    parser.add_argument("--rows", type=int, help="rows of the data, for a trial; default: all")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument(
        "--patch", type=int, default=8, help="width and height of a patch, in pixels"
    )
    parser.add_argument("--hidden", type=int, default=192, help="hidden size")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=128)
    options = parser.parse_args()
    pretrain(options)


def pretrain(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    data = read(options.data / "cifar100_pretrain.parquet", options.rows)
    mean, deviation = (of(data["train"][0], dim=(0, 2, 3)) for of in (torch.mean, torch.std))
    train, test = (
        ((pixels - mean.view(3, 1, 1)) / deviation.view(3, 1, 1), labels)
        for pixels, labels in data.values()
    )
    config = ViTConfig(
        image_size=SIZE,
        patch_size=options.patch,
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        intermediate_size=4 * options.hidden,
        num_labels=100,
    )
    model = ViTForImageClassification._from_config(
        config, attn_implementation="eager"
    )  # on a CPU, faster here than sdpa

    def loss_of(rows: Tensor) -> Tensor:
        """Return the loss on images and labels mixed in pairs (mixup, Zhang et al. 2018)."""
        images, labels = augment(train[0][rows]), functional.one_hot(train[1][rows], 100).float()
        part, others = mixing.sample(), torch.randperm(len(rows))
        logits = model(pixel_values=part * images + (1 - part) * images[others]).logits
        return functional.cross_entropy(
            logits.float(), part * labels + (1 - part) * labels[others], label_smoothing=0.1
        )

    mixing = torch.distributions.Beta(0.5, 0.5)
    fit(model, len(train[1]), options.batch_size, loss_of, options.steps)
    for name, (images, labels) in (("train", train), ("held-out", test)):
        print(f"{name} accuracy {accuracy(model, images, labels):.3f}")
    model.vit.save_pretrained(options.out)
    size = {"height": SIZE, "width": SIZE}
    ViTImageProcessorPil(
        size=size, do_convert_rgb=True, image_mean=mean.tolist(), image_std=deviation.tolist()
    ).save_pretrained(options.out)


if __name__ == "__main__":
    main()
