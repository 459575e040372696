"""Publishing: datasets for others, their cards, the student's card."""
