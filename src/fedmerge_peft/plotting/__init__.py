"""Figures as data, and their rendering as files and in pages."""
