"""Adapters that a model does not have: each is one error, before anything is trained."""

import pytest
import torch
from tests.conftest import TextTask

from fedmerge_peft import BackboneError
from fedmerge_peft.errors import RecipeError
from fedmerge_peft.models import pretrained
from fedmerge_peft.recipe.backbone import BackboneRecipe
from fedmerge_peft.recipe.lora import LoraRecipe


@pytest.mark.parametrize(
    ("kind", "lora", "message"),
    [
        (
            "bert",
            {"target_modules": ["q_proj"]},
            r"no module 'q_proj'; choose from query, key, value, dense",
        ),
        ("bert", {"target_modules": ["query", "quarry"]}, r"no module 'quarry'"),
        (
            "bert",
            {"target_modules": "nothing.*like.this"},
            r"whose path matches 'nothing.*like.this', .*; paths end in query.*\.\*\\.query",
        ),
        (
            "bert",
            {"target_modules": "query"},
            r"matches 'query', a pattern for the whole path; write \[query\]",
        ),
        ("bert", {"target_modules": ["query", "classifier"]}, r"'classifier' adapts no module"),
        (
            "bert",
            {"target_modules": ["query", "pooler.dense"], "layers_to_transform": [0]},
            r"target_modules: 'pooler.dense' adapts no module",
        ),
        (
            "bert",
            {"target_modules": ["query"], "exclude_modules": ["valeu"]},
            r"exclude_modules: .* has no module 'valeu' \(did you mean value\?\); choose from",
        ),
        (
            "bert",
            {"target_modules": ["query"], "exclude_modules": ".*valeu"},
            r"exclude_modules: .* has no module whose path matches '.*valeu', a pattern",
        ),
        (
            "bert",
            {"target_modules": ["query"], "layers_to_transform": [1, 11]},
            r"layers_to_transform: .* has no layer 11 with query; choose from 0, 1",
        ),
        (
            "bert",
            {"target_modules": ["query"], "layers_to_transform": -1},
            r"layers_to_transform: .* has no layer -1 with query; choose from 0, 1",
        ),
        ("gpt2", {"layers_to_transform": 7}, r"no layer 7 with c_attn; choose from 0, 1"),
        (
            "bert",
            {
                "target_modules": ["value", "bert.encoder.layer.0.attention.self.query"],
                "layers_to_transform": [1],
            },
            r"layers_to_transform: PEFT adapts bert.encoder.layer.0.*whole path",
        ),
        (
            "bert",
            {"target_modules": ["query"], "rank_pattern": {"qeury": 4}},
            r"rank_pattern: 'qeury' matches no module .*mean query.*modules with an adapter: query",
        ),
        (
            "bert",
            {"target_modules": ["query"], "rank_pattern": {"query": 4, "layer.0.*query": 2}},
            r"rank_pattern: 'layer.0.\*query' matches no module .* an earlier pattern matches",
        ),
        (
            "bert",
            {"target_modules": ["query"], "alpha_pattern": {"value": 4.0}},
            r"alpha_pattern: 'value' matches no module with an adapter",
        ),
        (
            "bert",
            {"target_parameters": ["query.wieght"]},
            r"target_parameters: .* has no parameter 'query.wieght' \(did you mean query.weight",
        ),
        (
            "bert",
            {"target_modules": ["query"], "trainable_token_indices": [-1]},
            r"trainable_token_indices: .* has no token -1; choose from 0 to",
        ),
        ("vit", {}, r"no default for vit; name some of q_proj"),
        ("bert", {"target_modules": ["LayerNorm"]}, r"does not support this adapter"),
        (
            "bert",
            {"target_modules": ["query"], "trainable_token_indices": [99999]},
            r"trainable_token_indices: .* has no token 99999; choose from 0 to",
        ),
        (
            "bert",
            {"target_modules": ["query"], "modules_to_save": ["nowhere"]},
            r"modules_to_save: .* has no module 'nowhere'",
        ),
    ],
)
def test_unknown_modules_are_refused_with_the_known_ones(make_backbone, kind, lora, message):
    with pytest.raises(BackboneError, match=message):
        make_backbone(kind, lora)


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq", "eva", "corda", False])
def test_starts_that_alter_the_backbone_are_refused(init):
    with pytest.raises(RecipeError, match="is not supported: merging requires"):
        LoraRecipe(init_lora_weights=init)


def test_a_model_of_another_kind_is_one_error(make_backbone):
    with pytest.raises(BackboneError, match="cannot be loaded as AutoModelForCausalLM"):
        make_backbone("vit", {"target_modules": ["q_proj"]}, TextTask())


def test_quantization_needs_its_package_and_a_device_that_it_supports(monkeypatch):
    quantized = BackboneRecipe(model="unused", quantization="4bit")
    monkeypatch.setattr(pretrained, "find_spec", lambda _: None)
    with pytest.raises(BackboneError, match="quantization needs bitsandbytes: pip install"):
        pretrained._quantization(quantized, torch.device("cpu"))
    monkeypatch.setattr(pretrained, "find_spec", lambda _: True)
    with pytest.raises(BackboneError, match="needs a CUDA GPU or a CPU, but this run uses mps"):
        pretrained._quantization(quantized, torch.device("mps"))
