"""Frozen pretrained model with an adapter slot, and stacks of adapters in one forward pass."""

import logging

# If bitsandbytes is installed, PEFT imports it. On some processors it then warns that an optional
# package of kernels is missing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
