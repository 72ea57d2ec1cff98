"""`python -m bench fused`: see `command.py`."""

from bench.fused.command import main

__all__ = ["main"]
