"""Whether stored targets belong to their tokens, with the teacher at hand or without."""
