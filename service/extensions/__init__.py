"""What both front ends answer of the Open Inference Protocol's extensions: pure, and free of any wire."""
