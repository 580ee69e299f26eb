"""The round loop, and the execution of recipes, which writes run directories."""
