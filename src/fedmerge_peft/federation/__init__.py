"""The round loop, and the execution of recipes into run directories."""
