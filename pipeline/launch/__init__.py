"""Launchers: they start a run's workers and its training on Ray or Slurm, which then need nothing but the store."""
