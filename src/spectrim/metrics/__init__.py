"""From moments to what an error of each linear costs; spectra on disk."""
