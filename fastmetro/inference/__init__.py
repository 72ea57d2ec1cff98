"""From an image file to a mesh file."""
