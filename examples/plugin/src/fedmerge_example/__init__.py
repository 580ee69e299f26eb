"""A plugin for fedmerge-peft: importing it registers a strategy, a metric and a partition scheme."""

from fedmerge_example import metric, partition, strategy

__all__ = ["metric", "partition", "strategy"]
