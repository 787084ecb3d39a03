"""Tests: `unit/` in seconds and without TensorFlow, `integration/` in one process, `e2e/` against `kiln serve`."""
