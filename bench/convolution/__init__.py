"""`python -m bench convolution`: see `command.py`."""

from bench.convolution.command import main

__all__ = ["main"]
