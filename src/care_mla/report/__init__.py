"""The HTML report, made from saved artifacts alone."""

from care_mla.report.html import render_report

__all__ = ["render_report"]
