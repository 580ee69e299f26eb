"""Run directories: reading, writing, checkpoints, trackers."""
