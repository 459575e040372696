"""The ledger: what a recipe asks for, and which stored rows can be reused for it."""
