"""Conversations as text: a tokenizer's chat template, what it reads, and where the assistant's turns are."""
