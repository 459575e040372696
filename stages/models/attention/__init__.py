"""What a model attends to: each sample of a pass by itself, nothing ahead, capped if configured."""
