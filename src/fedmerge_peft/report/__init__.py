"""One HTML page on one or several runs."""
