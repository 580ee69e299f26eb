"""A plugin for fedmerge-peft; its import registers a strategy, a metric and a partition scheme."""

from fedmerge_example import metric, partition, strategy

__all__ = ["metric", "partition", "strategy"]
