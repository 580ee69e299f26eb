"""Use a finished run: merged adapters, predictions, exports, adapters for new clients."""
