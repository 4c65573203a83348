"""Models answer side by side in a browser: what they say, where they part, and what they cost."""
