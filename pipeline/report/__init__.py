"""Figures, tables and cards of a run."""
