"""`kiln serve` as a process, with real models and the clients that people use."""
