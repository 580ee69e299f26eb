"""The frozen pretrained model, its adapter slot, and several adapters in one pass."""
