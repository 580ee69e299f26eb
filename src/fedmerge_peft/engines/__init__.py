"""Engines: clients trained in this process, or on the ranks of a launcher."""
