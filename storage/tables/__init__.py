"""Tables: their schemas, rows, soft targets, what must hold in them, and shards."""
