"""Figures as data, drawn by matplotlib or as SVG for a page, with one palette."""
