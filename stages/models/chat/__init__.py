"""Conversations as text: a tokenizer's chat template, and where the assistant's turns are."""
