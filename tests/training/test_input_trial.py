"""Outputs for an example do not depend on the others in its batch, whatever the architecture."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL.Image import fromarray
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from equality import assert_near
from fedmerge_peft import BackboneError, Recipe
from fedmerge_peft.models.adapter_slot import AdapterSlot
from fedmerge_peft.models.backbone import load_backbone
from fedmerge_peft.tasks import make_task
from fedmerge_peft.training.accelerator import make_accelerator
from fedmerge_peft.training.evaluation import example_losses
from fedmerge_peft.training.features import class_statistics
from fedmerge_peft.training.gradients import accumulate
from fedmerge_peft.training.input_trial import try_inputs
from fedmerge_peft.training.runtime import Runtime
from made_models import config_of, tokenizer_of, write

TEXTS = ["the parcel", "where is my refund now", "no", "the password of my account is lost again"]
ROWS = np.arange(4)


def load(folder, table, task):
    """The parts of an engine for the model of a folder, after the trial."""
    config = AutoConfig.from_pretrained(folder)
    adapted = {"target_modules": "all-linear"}
    if config.model_type == "mamba":  # PEFT does not adapt out_proj, whose kernel skips the module
        adapted = {"target_modules": ["in_proj", "x_proj"]}
    recipe = Recipe.model_validate(
        {
            "name": "trial",
            "task": task,
            "backbone": {"model": str(folder)},
            "lora": {"r": 2, **adapted},
            "data": {"path": "unused", "partition": {"scheme": "iid", "clients": 1}},
            "training": {"device": "cpu"},
        }
    )
    task = make_task(recipe, table, str(folder))
    model = load_backbone(
        recipe.backbone, recipe.lora, task, str(folder), torch.device("cpu"), recipe.seed
    )
    accelerator = make_accelerator(recipe.training)
    try_inputs(task, model, accelerator, "the model")
    return Runtime(model, task, accelerator, task.encode(table))


def classifier(folder):
    table = Dataset.from_dict({"text": TEXTS, "label": [0, 1, 2, 0]})
    return load(folder, table, {"name": "sequence-classification"})


def language_model(folder):
    table = Dataset.from_dict({"prompt": TEXTS, "completion": ["yes", "no, not now", "a", "b"]})
    generating = {"metrics": ["exact_match"], "max_new_tokens": 5}
    return load(folder, table, {"name": "causal-lm", **generating})


def row_of(runtime):
    row = runtime.backbone.fresh_row(0)
    return row + 0.05 * torch.randn(len(row), generator=torch.Generator().manual_seed(1))


def gradient(runtime, step):
    slot = AdapterSlot(runtime.backbone, row_of(runtime))
    # RWKV, which has no dropout, computes gradients in training mode only.
    runtime.backbone.model.train(runtime.backbone.model.config.model_type == "rwkv")
    accumulate(runtime, slot, [step])
    found = slot.gradient[0].clone()
    slot.gradient.zero_()
    return found


def assert_company_does_not_matter(runtime):
    row = row_of(runtime)
    assert_near(
        example_losses(runtime, row, ROWS, batch_size=4),
        example_losses(runtime, row, ROWS, batch_size=1),
    )
    assert_near(gradient(runtime, [ROWS]), gradient(runtime, [ROWS[[n]] for n in ROWS]))


@pytest.mark.parametrize(
    ("kind", "tokenizer", "padding"),
    [
        ("bert", "bert", "right"),
        ("roberta", "llama", "right"),
        ("mpnet", "bert", "right"),
        ("deberta-v2", "bert", "right"),
        ("gpt2", "gpt2", "right"),
        ("llama", "llama", "right"),
        ("xlnet", "gpt2", "left"),  # reads the last position
        ("fnet", "bert", "none"),  # mixes all positions
    ],
)
def test_batches_of_classifiers_are_formed_as_the_model_needs_them(
    kind, tokenizer, padding, tiny_models, tmp_path
):
    tokenizer = tokenizer_of(tiny_models, tokenizer)
    config = config_of(kind, tokenizer)
    runtime = classifier(write(tmp_path, AutoModel, config, tokenizer))
    assert runtime.task.padding == padding
    assert_company_does_not_matter(runtime)
    if kind in ("gpt2", "llama"):  # their heads read all positions, so there are no features
        return
    together, alone = (
        class_statistics(runtime, row_of(runtime), ROWS, batch_size) for batch_size in (4, 1)
    )
    assert_near(together, alone)


def test_padding_on_the_wrong_side_changes_the_losses(tiny_models, tmp_path):
    """Otherwise, the claims above would hold for any padding."""
    tokenizer = tokenizer_of(tiny_models, "bert")
    runtime = classifier(write(tmp_path, AutoModel, config_of("fnet", tokenizer), tokenizer))
    runtime.task.padding = "right"
    with pytest.raises(AssertionError):
        assert_company_does_not_matter(runtime)


@pytest.mark.parametrize(
    ("kind", "tokenizer", "padding", "prompts"),
    [
        ("llama", "llama", "right", "left"),
        ("gpt2", "gpt2", "right", "left"),
        ("mamba", "gpt2", "right", "left"),
        ("recurrent_gemma", "llama", "right", "none"),
        ("rwkv", "gpt2", "right", "alone"),
        ("bart", "llama", "right", "none"),
    ],
)
def test_generation_does_not_depend_on_the_other_prompts(
    kind, tokenizer, padding, prompts, tiny_models, tmp_path
):
    tokenizer = tokenizer_of(tiny_models, tokenizer)
    config = config_of(kind, tokenizer)
    runtime = language_model(write(tmp_path, AutoModelForCausalLM, config, tokenizer))
    task, model = runtime.task, runtime.backbone.model
    assert (task.padding, task.prompt_padding) == (padding, prompts)
    assert_company_does_not_matter(runtime)
    runtime.backbone.load_row(row_of(runtime))
    runtime.backbone.eval()

    def completions(indices):
        return task.complete(model, runtime.examples, indices, runtime.device)

    assert completions(ROWS) == [completions(ROWS[[n]])[0] for n in ROWS]


@pytest.mark.equality
def test_the_trial_leaves_the_adapter_and_the_random_numbers_as_they_were(tiny_models):
    runtime = classifier(tiny_models / "bert")
    held, state = runtime.backbone.row().clone(), torch.get_rng_state()
    try_inputs(runtime.task, runtime.backbone, runtime.accelerator, "the model")
    assert torch.equal(runtime.backbone.row(), held)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_that_does_not_run_on_texts_is_one_error(tiny_models):
    runtime = classifier(tiny_models / "bert")

    def fail(**_):
        raise KeyError("bbox")

    broken = SimpleNamespace(
        model=fail,
        device=torch.device("cpu"),
        eval=lambda: None,
        row=runtime.backbone.row,
        load_row=runtime.backbone.load_row,
    )
    fail.dtype, fail.config = torch.float32, runtime.backbone.model.config
    fail.get_input_embeddings = runtime.backbone.model.get_input_embeddings
    fail.named_modules = runtime.backbone.model.named_modules
    with pytest.raises(BackboneError, match=r"the model does not run on .*: KeyError: 'bbox'"):
        try_inputs(runtime.task, broken, runtime.accelerator, "the model")


def image_classifier(folder, **changes):
    """Write a ViT for images of 32 × 32 pixels and an image processor, and load both."""
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32}, **changes)
    processor.save_pretrained(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3), dtype=np.uint8)
    images = [fromarray(image) for image in pixels]
    table = Dataset.from_dict({"image": images, "label": [0, 1, 2]})
    return load(folder, table, {"name": "image-classification"})


def vit(folder, **changes):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 64, "image_size": 32, "patch_size": 8}
    config = ViTConfig(**{**sizes, **changes})
    ViTModel(config).save_pretrained(folder)
    return folder


def test_an_image_model_is_tried_on_the_images_of_its_processor(tmp_path, caplog):
    runtime = image_classifier(vit(tmp_path))
    assert runtime.task.padding == "right"
    assert not caplog.records


@pytest.mark.parametrize(
    ("config", "processor", "reason"),
    [
        (
            {},
            {"do_center_crop": True, "crop_size": {"height": 16, "width": 16}},
            "Input image size",
        ),
        ({"num_channels": 1}, {}, "channel"),
    ],
    ids=["size", "channels"],
)
def test_images_that_do_not_fit_the_model_are_refused_at_load(config, processor, reason, tmp_path):
    with pytest.raises(
        BackboneError, match=rf"does not run on the inputs of this task: .*{reason}"
    ):
        image_classifier(vit(tmp_path, **config), **processor)


def test_models_that_return_nan_are_refused_at_load(tmp_path):
    path = vit(tmp_path) / "model.safetensors"
    weights = load_file(path)
    weights["embeddings.cls_token"][:] = float("nan")
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(BackboneError, match="returns NaN on the inputs of this task"):
        image_classifier(tmp_path)


def test_pixels_that_are_not_scaled_are_warned_about(tmp_path, caplog):
    image_classifier(vit(tmp_path), do_rescale=False, do_normalize=False)
    assert "does not scale pixels: they are up to 2" in caplog.text


def test_processors_that_keep_the_sizes_of_images_are_tried_in_training(tmp_path):
    task = image_classifier(vit(tmp_path)).task
    task.processor.do_resize = False
    assert task.probe() is None
