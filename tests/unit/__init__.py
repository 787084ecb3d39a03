"""No sleep, no socket, no TensorFlow."""
