"""Where clients train."""
