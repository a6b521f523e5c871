"""Benchmarks: `python -m bench NAME`. LOG.md records what was tried, including failures."""
