"""Tables and figures from run directories."""

from fedmerge_peft.analysis.comparison import Comparison, compare
from fedmerge_peft.analysis.gap import local_global_gap
from fedmerge_peft.analysis.sharing import sharing
from fedmerge_peft.analysis.tables import scores_table, weights_table

__all__ = ["Comparison", "compare", "local_global_gap", "scores_table", "sharing", "weights_table"]
