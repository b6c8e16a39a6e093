"""The journal and the fingerprint of a run, and its MLflow run."""
