"""Training: one run, from params.yaml to a saved model."""
