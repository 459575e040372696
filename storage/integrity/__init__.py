"""Integrity: verify, repair, vacuum."""
