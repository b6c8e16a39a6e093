"""One training run, from params.yaml to a model."""
