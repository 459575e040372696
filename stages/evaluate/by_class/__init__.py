"""What a classifier takes for what: by class, and by type of entity."""
