"""What a model reads: the text of tokens, prompts as tokens, what fits, what images become."""
