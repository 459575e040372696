"""Snapshots: which rows, in which order, and reading them."""
