"""The inference engine: a trained network, folded, fused and captured."""
