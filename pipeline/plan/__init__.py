"""The plan: what would run, what is stored already, and why."""
