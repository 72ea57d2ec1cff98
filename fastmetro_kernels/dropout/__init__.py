"""Dropout in training without a stored mask: what is kept follows from a seed, by cheap random numbers."""

from fastmetro_kernels.dropout.api import relu_dropout

__all__ = ["relu_dropout"]
