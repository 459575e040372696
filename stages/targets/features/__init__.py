"""Features: what is captured of a teacher's layers, and of a student's, in a forward pass."""
