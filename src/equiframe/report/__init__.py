"""The report: run folders in, one self-contained HTML page (or figure files) out. It reads nothing but run folders."""

from equiframe.report.page import write_figures, write_report
from equiframe.report.runs import Group, RunData, find_runs, group_runs

__all__ = ["Group", "RunData", "find_runs", "group_runs", "write_figures", "write_report"]
