"""The frozen model and its one adapter slot."""

import json
import shutil

import pytest
import torch
from tests.conftest import ImageTask, LabelTask

from equality import assert_near
from fedmerge_peft import BackboneError
from fedmerge_peft.models.pretrained import align_weights
from fedmerge_peft.recipe.lora import LoraRecipe


def inputs(kind):
    if kind == "vit":
        return {
            "pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        }
    return {"input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])}


TARGETS = {
    "bert": ["query", "value"],
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "v_proj"],
    "vit": ["q_proj", "v_proj"],
}
LORA_FIELDS = [
    {},
    {"use_rslora": True},
    {"use_dora": True},
    {"bias": "all"},
    {"bias": "lora_only"},
    {"init_lora_weights": "gaussian"},
    {"rank_pattern": {"encoder.*|.*h.*|.*layers.*": 2}},
    {"layers_to_transform": [1]},
    {"exclude_modules": r".*(value|v_proj|h\.0\.attn\.c_attn)"},
    {"merge": "shared_a"},
    {"dropout": 0.1},
]


def test_weights_that_a_mapped_file_left_unaligned_are_copied_unchanged():
    mapped = torch.arange(40.0)
    model = torch.nn.Linear(3, 4)
    model.weight.data, model.bias.data = mapped[1:13].view(4, 3), mapped[16:20]
    align_weights(model)
    assert model.weight.tolist() == torch.arange(1.0, 13.0).view(4, 3).tolist()
    assert model.weight.data_ptr() % 64 == 0
    assert model.bias.data_ptr() == mapped[16:].data_ptr()  # it was aligned


@pytest.mark.parametrize("fields", LORA_FIELDS, ids=str)
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "vit"])
def test_an_adapter_passes_through_the_slot_unchanged_and_decides_the_output(
    make_backbone, kind, fields
):
    backbone = make_backbone(kind, {"target_modules": TARGETS[kind], **fields})
    one, two = backbone.fresh_row(1), backbone.fresh_row(2)
    two = two + 0.1
    backbone.load_row(one)
    assert torch.equal(backbone.row(), one)
    with torch.no_grad():
        first = backbone.model(**inputs(kind)).logits
        backbone.load_row(two)
        second = backbone.model(**inputs(kind)).logits
        backbone.load_row(one)
        again = backbone.model(**inputs(kind)).logits
    assert not torch.allclose(first, second)
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    "fields",
    [
        *LORA_FIELDS,
        {"rank_pattern": {"query": 2}, "alpha_pattern": {"value": 4.0}},
        {"trainable_token_indices": [5, 6]},
    ],
    ids=str,
)
def test_merged_adapters_load_in_plain_peft_and_give_the_same_logits(
    make_backbone, tiny_models, tmp_path, fields
):
    from peft import PeftModel
    from safetensors.torch import save_file
    from transformers import AutoModelForSequenceClassification

    from fedmerge_peft import AdapterSoup

    backbone = make_backbone("bert", {"target_modules": TARGETS["bert"], **fields})
    rows = torch.stack([backbone.fresh_row(number) for number in range(2)]) + 0.05
    soup = AdapterSoup(rows, backbone.layout, backbone.shared)
    merged = soup.merge(torch.tensor([0.3, 0.7]))
    save_file(
        {k: v.clone() for k, v in soup.state_dict(merged).items()},
        tmp_path / "adapter_model.safetensors",
        {"format": "pt"},
    )
    backbone.config.save_pretrained(tmp_path)

    plain = AutoModelForSequenceClassification.from_pretrained(tiny_models / "bert", num_labels=3)
    plain = PeftModel.from_pretrained(plain, tmp_path).eval()
    backbone.load_row(merged)
    with torch.no_grad():
        assert_near(plain(**inputs("bert")).logits, backbone.model(**inputs("bert")).logits)


@pytest.mark.equality
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "vit"])
def test_gradients_land_in_the_flat_vector(make_backbone, kind):
    backbone = make_backbone(kind, {"target_modules": TARGETS[kind]})
    backbone.load_row(backbone.fresh_row(1) + 0.01)
    backbone.model(**inputs(kind)).logits.square().sum().backward()
    gradient = backbone.flat.grad
    assert (gradient != 0).float().mean() > 0.9
    named = {name: p for name, p in backbone.model.named_parameters() if p.requires_grad}
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in named.values()]), gradient)


def test_the_backbone_is_frozen(make_backbone):
    backbone = make_backbone("bert", {"target_modules": ["query"]})
    trainable = {name for name, p in backbone.model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name or "modules_to_save" in name for name in trainable)


def test_fresh_adapters_differ_in_a_and_in_a_head_that_is_not_pretrained(make_backbone):
    backbone = make_backbone("bert", {"target_modules": ["query"]})
    one, two = (backbone.layout.state_dict(backbone.fresh_row(seed)) for seed in (1, 2))
    for key in one:
        same = torch.equal(one[key], two[key])
        assert same == ("lora_B" in key or key.endswith("bias")), key


def test_the_same_seed_gives_the_same_fresh_adapter_and_keeps_the_slot(make_backbone):
    backbone = make_backbone("bert", {"target_modules": ["query"]})
    before = backbone.row()
    torch.manual_seed(123)
    expected_noise = torch.rand(1)
    torch.manual_seed(123)
    one = backbone.fresh_row(7)
    assert torch.equal(torch.rand(1), expected_noise)
    assert torch.equal(backbone.row(), before)
    assert torch.equal(
        one, make_backbone("bert", {"target_modules": ["query"]}, seed=5).fresh_row(7)
    )


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"bias": "all"},
        {"use_dora": True},
        {"trainable_token_indices": [5]},
        {"modules_to_save": ["pooler"]},
    ],
)
def test_a_fresh_adapter_does_not_depend_on_the_slots_contents(make_backbone, fields):
    backbone = make_backbone("bert", {"target_modules": ["query"], **fields})
    before = backbone.fresh_row(7)
    backbone.load_row(torch.randn(backbone.layout.size))
    assert torch.equal(backbone.fresh_row(7), before)


def test_weights_missing_from_the_pretrained_model_are_part_of_the_adapter(make_backbone, tmp_path):
    """A BERT saved without its pooler; a random pooler must be part of the adapter."""
    from transformers import AutoModel

    from fedmerge_peft.models.backbone import load_backbone
    from fedmerge_peft.recipe.backbone import BackboneRecipe

    config = make_backbone("bert", {"target_modules": ["query"]}).model.get_base_model().config
    AutoModel.from_config(config, add_pooling_layer=False).save_pretrained(tmp_path)
    recipe = BackboneRecipe(model=str(tmp_path))
    backbone = load_backbone(
        recipe,
        LoraRecipe(target_modules=["query"]),
        LabelTask(),
        str(tmp_path),
        torch.device("cpu"),
        0,
    )
    assert "base_model.model.bert.pooler.dense.weight" in {
        entry.key for entry in backbone.layout.entries
    }
    assert not torch.equal(
        backbone.fresh_row(1)[backbone.layout.columns("head")],
        backbone.fresh_row(2)[backbone.layout.columns("head")],
    )


@pytest.mark.equality
def test_a_decoder_that_classifies_uses_the_tasks_padding(make_backbone):
    class Padded(LabelTask):
        pad_token_id = 3

    backbone = make_backbone("llama", {"target_modules": ["q_proj"]}, Padded())
    words = torch.tensor([[5, 6, 7]])
    padded = torch.tensor([[5, 6, 7, 3, 3]])
    with torch.no_grad():
        plain = backbone.model(input_ids=words).logits
        longer = backbone.model(
            input_ids=padded, attention_mask=torch.tensor([[1, 1, 1, 0, 0]])
        ).logits
    assert_near(longer, plain)


def test_running_statistics_do_not_change(tmp_path):
    from transformers import ResNetConfig, ResNetForImageClassification

    from fedmerge_peft.models.backbone import load_backbone
    from fedmerge_peft.recipe.backbone import BackboneRecipe

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(tmp_path)
    recipe = BackboneRecipe(model=str(tmp_path))
    backbone = load_backbone(
        recipe,
        LoraRecipe(target_modules=["convolution"]),
        ImageTask(),
        str(tmp_path),
        torch.device("cpu"),
        0,
    )
    before = {name: buffer.clone() for name, buffer in backbone.model.named_buffers()}
    backbone.train()
    backbone.model(pixel_values=torch.randn(4, 3, 32, 32))
    assert all(torch.equal(buffer, before[name]) for name, buffer in backbone.model.named_buffers())


@pytest.mark.parametrize(("key", "value"), [("return_dict", False), ("torchscript", True)])
def test_outputs_have_names_whatever_the_configuration_says(tiny_models, tmp_path, key, value):
    from fedmerge_peft.models.backbone import load_backbone
    from fedmerge_peft.recipe.backbone import BackboneRecipe

    folder = shutil.copytree(tiny_models / "bert", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    backbone = load_backbone(
        BackboneRecipe(model=str(folder)),
        LoraRecipe(target_modules=["query"]),
        LabelTask(),
        str(folder),
        torch.device("cpu"),
        0,
    )
    assert len(backbone.model(**inputs("bert")).logits) == 2


def test_half_precision_with_trained_biases_is_refused(make_backbone):
    with pytest.raises(BackboneError, match=r"lora.bias: .* use backbone.dtype=float32"):
        make_backbone("bert", {"target_modules": ["query"], "bias": "all"}, dtype="bfloat16")


def test_half_precision_with_whole_modules_inside_runs(make_backbone):
    backbone = make_backbone(
        "bert",
        {"target_modules": ["query"], "modules_to_save": ["word_embeddings"]},
        dtype="bfloat16",
    )
    assert backbone.model(**inputs("bert")).logits.isfinite().all()


def test_a_pretrained_head_with_the_right_labels_is_kept(make_backbone, tmp_path):
    from transformers import AutoModelForSequenceClassification

    from fedmerge_peft.models.backbone import load_backbone
    from fedmerge_peft.recipe.backbone import BackboneRecipe

    backbone = make_backbone("bert", {"target_modules": ["query"]})
    whole = AutoModelForSequenceClassification.from_config(backbone.model.get_base_model().config)
    whole.save_pretrained(tmp_path)
    again = load_backbone(
        BackboneRecipe(model=str(tmp_path)),
        LoraRecipe(target_modules=["query"]),
        LabelTask(),
        str(tmp_path),
        torch.device("cpu"),
        0,
    )
    state = again.layout.state_dict(again.fresh_row(3))
    assert torch.equal(state["base_model.model.classifier.weight"], whole.classifier.weight)


def test_shared_a_halves_the_traffic(make_backbone):
    """Query is square here, so A and B have the same size; the head travels in both."""
    whole = make_backbone("bert", {"target_modules": ["query"]})
    shared = make_backbone("bert", {"target_modules": ["query"], "merge": "shared_a"})
    head = len(whole.layout.columns("head"))
    assert shared.layout.size - head == (whole.layout.size - head) / 2
    assert all("lora_A" in key for key in shared.shared)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_adapters_stay_float32_on_a_half_precision_backbone(make_backbone, dtype):
    backbone = make_backbone("bert", {"target_modules": ["query"]}, dtype=dtype)
    base = backbone.model.get_base_model()
    assert base.bert.encoder.layer[0].attention.self.key.weight.dtype == getattr(torch, dtype)
    assert backbone.flat.dtype == torch.float32
    backbone.model(**inputs("bert")).logits.sum().backward()
    assert backbone.flat.grad.isfinite().all()


@pytest.mark.equality
def test_gradient_checkpointing_does_not_change_gradients(make_backbone):
    found = []
    for checkpointing in (False, True):
        backbone = make_backbone(
            "bert", {"target_modules": ["query"]}, gradient_checkpointing=checkpointing
        )
        backbone.load_row(backbone.fresh_row(1) + 0.01)
        backbone.model.train()
        for module in backbone.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        backbone.model(**inputs("bert")).logits.sum().backward()
        found.append(backbone.flat.grad.clone())
    assert_near(*found)
