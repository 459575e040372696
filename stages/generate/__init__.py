"""Stage `generate`: prompts become generations."""
