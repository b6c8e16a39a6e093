"""The journal of a run, its fingerprint, and MLflow."""
