"""Limits of what is read from files of strangers."""

MAX_PIXELS = 178_956_970
"""Larger images are refused: a small file can claim any size. Pillow refuses them, too."""
