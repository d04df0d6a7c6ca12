"""MLflow: where it is, a run in it, what is sent to it."""
