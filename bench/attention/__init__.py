"""Benchmark of topology-masked attention: `python -m bench attention`; see `command.py`."""

from bench.attention.command import main

__all__ = ["main"]
