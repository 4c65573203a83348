"""What is on disk: one writer at a time, tensors with their digests, temporary folders."""
