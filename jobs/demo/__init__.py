"""python -m jobs.demo: the whole path in a few minutes, on videos that it makes."""
