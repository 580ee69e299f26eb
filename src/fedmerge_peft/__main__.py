"""``python -m fedmerge_peft`` runs ``fedmerge``, so that a launcher can start it on several ranks.

Example: ``torchrun -m fedmerge_peft run RECIPE``
"""

from fedmerge_peft.cli import main

main()
