"""What a model's small files say of whether it fits: config, tokenizer, shapes of weights.

There is no torch here.
"""
