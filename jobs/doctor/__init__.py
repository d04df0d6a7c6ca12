"""python -m jobs.doctor: examines a machine or a cluster before a run."""
