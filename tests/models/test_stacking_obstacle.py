"""Reasons, derived from the model, for which adapters of several clients cannot share a pass."""

import pytest
from torch import nn
from transformers import PretrainedConfig

from fedmerge_peft.models.adapter_stack import stacking_obstacle


def test_layers_that_mix_examples_are_detected_by_name(make_backbone):
    backbone = make_backbone("bert")
    assert stacking_obstacle(backbone) is None
    backbone.model.get_base_model().extra = nn.BatchNorm1d(4).requires_grad_(False)
    assert stacking_obstacle(backbone) is None  # its running statistics are the pretrained ones
    backbone.model.get_base_model().extra = nn.BatchNorm1d(
        4, affine=False, track_running_stats=False
    )
    assert stacking_obstacle(backbone) == "extra mixes the examples of a batch (BatchNorm1d)"
    del backbone.model.get_base_model().extra


class TinyExperts(nn.Module):
    """Experts of a model whose configuration names their number differently."""


@pytest.mark.parametrize("place", ["configuration", "nested configuration", "module"])
def test_adapters_of_experts_are_detected_by_their_place(make_backbone, place):
    backbone = make_backbone("llama", {"target_modules": ["q_proj", "up_proj"]})
    assert stacking_obstacle(backbone) is None
    config = backbone.model.config
    if place == "module":
        backbone.model.get_base_model().extra = TinyExperts()
    elif place == "nested configuration":
        config.text_config = PretrainedConfig()
        config.text_config.num_local_experts = 4
    else:
        config.num_local_experts = 4
    assert stacking_obstacle(backbone) == (
        "model.layers.0.mlp.up_proj may see the tokens of some examples only, as experts do"
    )
    backbone = make_backbone("llama", {"target_modules": ["q_proj", "o_proj"]})
    backbone.model.config.num_local_experts = 4
    assert stacking_obstacle(backbone) is None
