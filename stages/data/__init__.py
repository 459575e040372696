"""Stage `data`: a source of records becomes rows of prompts and given text."""
