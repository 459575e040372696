"""Tables: their schemas, rows, soft targets, invariants and shards."""
