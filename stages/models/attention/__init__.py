"""What a model attends to: samples of a pass each by itself, nothing ahead, capped where its config says so."""
