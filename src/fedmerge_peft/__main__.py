"""Run ``fedmerge`` as ``python -m fedmerge_peft``, which a launcher can start on several ranks.

Example, on four ranks: ``torchrun --nproc_per_node 4 -m fedmerge_peft run RECIPE``
"""

from fedmerge_peft.cli import main

main()
