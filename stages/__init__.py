"""One folder per stage, and what the stages share."""
