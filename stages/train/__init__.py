"""Stage `train`: soft targets, or text alone, become a student."""
