"""Jinja templates of reports and cards."""
