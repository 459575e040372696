"""Soft targets: the shift, what is stored of a distribution, how it is computed and read."""
