"""Recipes that ship with Stillroom."""
