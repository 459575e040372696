"""The recipe: its sections, how it is read, what is refused. Nothing here imports torch."""
