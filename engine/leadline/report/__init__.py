"""Pictures and pages of a run."""

from leadline.report.plan import print_plan
from leadline.report.summary import hardest, print_summary

__all__ = ["hardest", "print_plan", "print_summary"]
