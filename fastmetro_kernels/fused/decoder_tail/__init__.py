"""Everything of a narrow decoder layer behind its self-attention, in one launch."""

from fastmetro_kernels.fused.decoder_tail.api import decoder_tail
from fastmetro_kernels.fused.decoder_tail.configs import TailConfig
from fastmetro_kernels.fused.decoder_tail.weights import TailWeights

__all__ = ["TailConfig", "TailWeights", "decoder_tail"]
