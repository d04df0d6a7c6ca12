"""video -> shard -> clip batch: packing videos into WebDataset tars, and reading them back in an exact order."""
