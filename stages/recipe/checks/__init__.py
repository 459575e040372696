"""Whether the fields of a recipe, each right by itself, can work together."""
