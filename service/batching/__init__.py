"""The request batcher: a pure queue that decides, and a thin loop that waits, runs and resolves."""
