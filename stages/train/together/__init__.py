"""Training by several ranks.

It says who holds which weights, and what the ranks tell one another in a step.
"""
