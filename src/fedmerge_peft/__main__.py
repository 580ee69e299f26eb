"""``python -m fedmerge_peft`` is ``fedmerge``: so a launcher can start it on several ranks, as ``torchrun -m fedmerge_peft run RECIPE``."""

from fedmerge_peft.cli import main

main()
