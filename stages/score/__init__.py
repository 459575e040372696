"""Stage `score`: generations become soft targets."""
