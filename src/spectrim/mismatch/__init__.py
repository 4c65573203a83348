"""What text-only whitening misses (JW-SVD, section 3)."""
