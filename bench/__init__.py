"""Benchmarks, one module per op: `python -m bench <op> [options]`. Every figure names what it was measured on."""
