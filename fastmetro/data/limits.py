"""Limits of what is read from files of strangers."""

MAX_PIXELS = 200_000_000
"""Larger images are refused: a small file can claim any size."""
