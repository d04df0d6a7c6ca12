"""python -m jobs.inspect_shards: looks into a packed data set."""
