"""Training by several ranks: who holds which weights, and what the ranks tell one another in a step."""
