"""People rendered on the fly: random bodies, poses, cameras, clothes, lights, occluders and backgrounds."""
