"""Losses of features: what a teacher knows beyond its last layer."""
