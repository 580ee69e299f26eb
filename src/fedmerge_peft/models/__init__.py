"""Frozen pretrained model with a slot for one adapter; stacks of adapters for one forward pass."""
