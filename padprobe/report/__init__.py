"""Results -> one page, its tables and figures, with the paper's own numbers beside ours."""

from padprobe.report.page import main_table, write_report

__all__ = ["main_table", "write_report"]
