"""Local training and evaluation: plans, the loop, the prefix cache."""
