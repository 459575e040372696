"""Engines that write text: what one does, and the ones there are."""
