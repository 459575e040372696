"""Models: identity, loading, head, attention, classes, tokenizers."""
