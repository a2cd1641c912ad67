"""Benchmarks, run by `make bench`: what they measure is compared within one run, and written to docs/benchmarks.*."""
