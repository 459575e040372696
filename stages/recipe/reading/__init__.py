"""What stands between a file that people wrote and the sections.

That is YAML within bounds, and hints at unknown keys.
"""
