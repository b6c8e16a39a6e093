"""Errors, files, signals, processes and the machine."""
