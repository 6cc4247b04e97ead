"""Pictures and pages of a run."""

from leadline.report.summary import hardest, print_summary

__all__ = ["hardest", "print_summary"]
