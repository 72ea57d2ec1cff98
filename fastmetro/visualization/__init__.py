"""Pictures of meshes: headless rendering with the project's own rasteriser, overlays on photographs, sheets."""
