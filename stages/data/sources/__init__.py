"""Where records come from: which files are data, of which split, and how each is read."""
