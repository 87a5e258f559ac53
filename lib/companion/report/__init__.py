"""Figures, tables, intervals, verdicts."""
