"""Engines that train clients in this process, or on the ranks that a launcher starts."""
