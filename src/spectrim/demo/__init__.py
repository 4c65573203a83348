"""The built-in model: its tasks, its text, its images, and the checkpoint itself."""
