"""Convert text to tokens, token files and batches."""
