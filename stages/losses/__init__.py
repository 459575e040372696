"""Losses: divergences, cross-entropy, and both without ever holding all logits."""
