"""The commands: python -m jobs.NAME. Here the packages meet; each file is one job."""
