"""The recipe, the plan, the runner, the command line and the report.

Nothing imports this package.
"""
