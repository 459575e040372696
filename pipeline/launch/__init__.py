"""Launchers start a run's workers and its training on Ray or Slurm.

Both then need nothing but the store.
"""
