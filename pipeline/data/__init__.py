"""Text to tokens, token files and batches."""
