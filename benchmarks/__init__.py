"""Measurements: `python -m benchmarks.THEME [--json FILE] [--quick]`, or `make bench THEME=theme`."""
