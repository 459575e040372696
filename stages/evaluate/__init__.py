"""Stage `evaluate`: teacher and students on the same held-out rows."""
