"""Convolution + bias (+ residual) (+ ReLU) in one kernel, for inference at small batches; see :func:`convolution`."""

from fastmetro_kernels.convolution.api import choose, convolution
from fastmetro_kernels.convolution.configs import ConvolutionConfig, PairConfig, pair_configs
from fastmetro_kernels.convolution.double_stem import (
    DoubleStemConfig,
    DoubleStemWeights,
    choose_double_stem,
    convolution_double_stem,
    double_stem_configs,
    lay_out_double_stem,
    pack_double_stem,
)
from fastmetro_kernels.convolution.ending import choose_ending, convolution_ending, ending_problem
from fastmetro_kernels.convolution.join import choose_join, convolution_join, join_problem
from fastmetro_kernels.convolution.join_configs import JoinConfig
from fastmetro_kernels.convolution.layout import ConvolutionWeights, lay_out
from fastmetro_kernels.convolution.pair import choose_pair, convolution_pair, pair_problem
from fastmetro_kernels.convolution.stem import (
    StemConfig,
    StemWeights,
    choose_stem,
    convolution_stem,
    lay_out_stem,
    pack_stem,
    stem_configs,
)

__all__ = [
    "ConvolutionConfig",
    "ConvolutionWeights",
    "DoubleStemConfig",
    "DoubleStemWeights",
    "JoinConfig",
    "PairConfig",
    "StemConfig",
    "StemWeights",
    "choose",
    "choose_double_stem",
    "choose_ending",
    "choose_join",
    "choose_pair",
    "choose_stem",
    "convolution",
    "convolution_double_stem",
    "convolution_ending",
    "convolution_join",
    "convolution_pair",
    "convolution_stem",
    "double_stem_configs",
    "ending_problem",
    "join_problem",
    "lay_out",
    "lay_out_double_stem",
    "lay_out_stem",
    "pack_double_stem",
    "pack_stem",
    "pair_configs",
    "pair_problem",
    "stem_configs",
]
