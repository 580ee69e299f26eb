"""The round loop, and whole recipes into run directories."""
