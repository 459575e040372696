"""The run: one process group a stage, its screen, its timings."""
