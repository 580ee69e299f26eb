"""Tables and figures made from run directories, and from nothing else."""

from fedmerge_peft.analysis.comparison import Comparison, compare
from fedmerge_peft.analysis.tables import scores_table, weights_table

__all__ = ["Comparison", "compare", "scores_table", "weights_table"]
