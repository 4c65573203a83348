"""Fast paths that run stored forms, each beside a plain reference; which one runs is chosen when a model is loaded."""
