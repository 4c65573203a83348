"""The forms in which a linear can be stored."""
