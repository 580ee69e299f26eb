"""Utilities without knowledge of federated learning: files, seeds, vectors, timing, logging."""
