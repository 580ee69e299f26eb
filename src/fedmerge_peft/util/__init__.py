"""Tools below everything else: files, seeds, long vectors, rows on disk, saved state, time."""
