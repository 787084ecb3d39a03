"""The real front ends, and TensorFlow where that is the point."""
