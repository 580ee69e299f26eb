"""Utilities below all other rooms: files, seeds, vectors, row buffers, state, timing, logging."""
