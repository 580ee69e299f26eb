"""Reasons, derived from the model, for which adapters of several clients cannot share a pass."""

from torch import nn

from fedmerge_peft.models.adapter_stack import stacking_obstacle


def test_experts_and_layers_that_mix_examples_are_detected_by_name(make_backbone):
    backbone = make_backbone("bert")
    assert stacking_obstacle(backbone) is None
    backbone.model.get_base_model().extra = nn.BatchNorm1d(4).requires_grad_(False)
    assert stacking_obstacle(backbone) is None  # its running statistics are the pretrained ones
    backbone.model.get_base_model().extra = nn.BatchNorm1d(
        4, affine=False, track_running_stats=False
    )
    assert stacking_obstacle(backbone) == "extra mixes the examples of a batch (BatchNorm1d)"
    del backbone.model.get_base_model().extra
    backbone.model.config.num_local_experts = 4
    assert (
        stacking_obstacle(backbone)
        == "the model routes tokens to experts (num_local_experts in its configuration)"
    )
