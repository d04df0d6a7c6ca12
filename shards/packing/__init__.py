"""Videos -> shards: sources, checks, encoding, tars and their index."""
