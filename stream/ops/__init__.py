"""Pure tensor functions: no state, no randomness without a generator, ties by index."""
