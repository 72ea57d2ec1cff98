"""Limits of images."""

MAX_PIXELS = 178_956_970
"""Larger ones in files are refused: a small file can claim any size. Pillow refuses them, too."""
MIN_IMAGE_SIZE, MAX_IMAGE_SIZE = 16, 4096
"""Sides, in pixels, of the images that a network is trained on."""
