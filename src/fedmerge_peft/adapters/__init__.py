"""Adapters as rows of floats: layout, soup, merging weights, exact averages of updates."""

from fedmerge_peft.adapters.exact_merge import concat, merge_error
from fedmerge_peft.adapters.layout import AdapterLayout
from fedmerge_peft.adapters.merging_weights import MergingWeights
from fedmerge_peft.adapters.soup import AdapterSoup

__all__ = ["AdapterLayout", "AdapterSoup", "MergingWeights", "concat", "merge_error"]
