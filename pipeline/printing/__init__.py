"""What people read: numbers, text of others made harmless, a terminal."""
