"""Shards -> batches: the order of samples, clips, decoding."""
