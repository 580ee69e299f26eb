"""Frozen pretrained model with an adapter slot, and stacks of adapters in one forward pass."""
