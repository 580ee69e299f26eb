"""Using what was learned: merged adapters, predictions, exports, new clients."""
