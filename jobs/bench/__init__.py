"""python -m jobs.bench: speed and memory, as ratios against a peer or a limit in the same run."""
