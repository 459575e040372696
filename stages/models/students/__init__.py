"""The student: where it comes from, its adapter, and the folder that it ends up in."""
