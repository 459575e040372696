"""Foreign tables of ids and log-probabilities, row by row into a store."""
