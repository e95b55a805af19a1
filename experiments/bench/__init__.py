"""Benchmarks: each writes one record under `results/benchmarks`."""
