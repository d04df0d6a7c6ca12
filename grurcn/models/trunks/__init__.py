"""Image networks whose maps a model reads: frames -> {tap: map}."""
