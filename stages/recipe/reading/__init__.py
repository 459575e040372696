"""What stands between a file that people wrote and the sections: YAML within bounds, hints at unknown keys."""
