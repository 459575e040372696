"""What a run's numbers mean for its user: one table of advice, and who looks at which numbers."""
