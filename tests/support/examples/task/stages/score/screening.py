"""Soft targets of screened texts: those of classification."""

from .classification import Teacher

__all__ = ["Teacher"]
