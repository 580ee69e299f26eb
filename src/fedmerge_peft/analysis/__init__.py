"""Tables made from run directories, and from nothing else."""

from fedmerge_peft.analysis.tables import comparison, weights_table

__all__ = ["comparison", "weights_table"]
