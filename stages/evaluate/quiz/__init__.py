"""Greedy answers of the arms, and how they are graded."""
