"""Benchmarks: `python -m bench NAME`. What was tried, failures too, is in LOG.md."""
