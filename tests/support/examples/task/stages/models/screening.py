"""Models of the task screening: those of classification."""

from .classification import load_teacher, student_kind

__all__ = ["load_teacher", "student_kind"]
