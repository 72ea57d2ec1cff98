"""`python -m bench upsampling`: see `command.py`."""

from bench.upsampling.command import main

__all__ = ["main"]
