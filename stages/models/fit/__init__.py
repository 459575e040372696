"""What a model's small files say of whether it fits: its config, its tokenizer, the shapes of its weights. No torch."""
