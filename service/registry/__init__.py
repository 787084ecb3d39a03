"""What is on disk, which versions are wanted, and the loop that gets them there."""
