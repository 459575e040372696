"""What a model reads: the text of tokens, prompts as tokens, whether a text fits, what becomes of an image."""
