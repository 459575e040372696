"""The store: commits, writers, the index, SQL."""
