"""Figures, tables and cards."""
