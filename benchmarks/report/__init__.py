"""Reports as one HTML file: of a single replay, and of a whole plan."""

from benchmarks.report.plan_page import write_plan_report
from benchmarks.report.replay_page import verdict, write_report

__all__ = ["verdict", "write_plan_report", "write_report"]
