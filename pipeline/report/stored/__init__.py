"""What a store holds, for people: one row of it, and its teachers side by side."""
