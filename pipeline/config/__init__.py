"""params.yaml and its recipes."""
