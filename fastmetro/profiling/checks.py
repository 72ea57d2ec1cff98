"""No time without a right result: contenders against the plain float32 network."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmetro.models import FastMETRO
from fastmetro.profiling.contenders import Contender, Outputs, plain_model
from fastmetro.profiling.latency import tensor_float_32

MESH = "pred_3d_vertices_fine"
FACTOR = 3.0
"""A contender may be this much farther off than the plain network in the same precision."""
DRAWS = 8
"""Samples that the plain network's error is the largest of, at least. Rounding in the trunk moves all vertices of a
sample together, so that a batch of one would be a single draw of an error whose size scatters."""
FLOOR = 1e-5
"""Relative to the size of the output, what float32 is allowed anyway."""


class WrongResult(Exception):
    """A contender's outputs are not those of the network."""


@dataclass(frozen=True)
class Verdict:
    """In mm: how far a fine vertex is at most from where the plain float32 network puts it, and how far it may be."""

    error_mm: float
    limit_mm: float


class Truth:
    """The outputs of the plain float32 network for some images, and how far off it is in lower precision.

    Args:
        model: float32, in evaluation mode; on the device of the images.
        images: normalised [B, 3, 224, 224].
    """

    def __init__(self, model: FastMETRO, images: Tensor) -> None:
        self._model = model
        self._images = images
        self._plain = plain_model(model)
        self.outputs = self._run(lambda: self._plain(images), False)
        self._errors: dict[str, dict[str, float]] = {"float32": dict.fromkeys(self.outputs, 0.0)}

    @staticmethod
    @torch.no_grad()
    def _run(call: Callable[[], Outputs], tf32: bool) -> Outputs:
        """Copies of the outputs: graphs write theirs again."""
        with tensor_float_32(tf32):
            return {key: value.float().clone() for key, value in call().items()}

    def plain_errors(self, precision: str) -> dict[str, float]:
        """Errors of the plain network by key in a precision."""
        if precision not in self._errors:
            tf32 = precision == "tf32"
            plain = self._plain if tf32 else plain_model(self._model, getattr(torch, precision))
            errors = [self._plain_errors(plain, self._images, self.outputs, tf32)]
            if len(self._images) < DRAWS:
                more = self._more_images()
                exact = self._run(lambda: self._plain(more), False)
                errors.append(self._plain_errors(plain, more, exact, tf32))
            self._errors[precision] = {key: max(one[key] for one in errors) for key in self.outputs}
        return self._errors[precision]

    def _more_images(self) -> Tensor:
        """Normalised noise, so many that there are `DRAWS` images together with those that are checked."""
        shape = (DRAWS - len(self._images), *self._images.shape[1:])
        return torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(self._images.device)

    def _plain_errors(self, plain: FastMETRO, images: Tensor, exact: Outputs, tf32: bool) -> dict[str, float]:
        out = self._run(lambda: plain(images.to(plain.xyz_regressor.weight.dtype)), tf32)
        return {key: _error(key, out[key], value) for key, value in exact.items()}

    def check(self, contender: Contender) -> Verdict:
        """Run a contender and compare everything it returns.

        Raises:
            WrongResult: an output is missing, has another shape, is not finite or is too far off.
        """
        out = self._run(lambda: contender.run(self._images), contender.uses_tf32)
        plain = self.plain_errors(contender.precision)
        verdicts = {}
        for key, expected in self.outputs.items():
            if key not in out or out[key].shape != expected.shape:
                got = list(out[key].shape) if key in out else "nothing"
                raise WrongResult(f"{key} must have shape {list(expected.shape)}, got {got}")
            error = _error(key, out[key], expected)
            limit = FACTOR * plain[key] + FLOOR * _size(key, expected)
            if contender.half_meshes:  # coordinates, weights and results rounded once each: three half eps
                limit += 1.5 * torch.finfo(getattr(torch, contender.precision)).eps * _size(key, expected)
            if not error <= limit:
                unit = "mm" if _is_mesh(key) else "(no unit)"
                raise WrongResult(f"{key} is off by {error:.4g} {unit}, allowed are {limit:.4g}")
            verdicts[key] = Verdict(error, limit)
        return verdicts[MESH]


def _is_mesh(key: str) -> bool:
    return key.startswith("pred_3d_")


def _error(key: str, actual: Tensor, expected: Tensor) -> float:
    """Largest distance of a point in mm, or the largest difference of what are not points; NaN stays NaN."""
    difference = actual.double() - expected.double()
    if _is_mesh(key):
        return 1e3 * float(difference.norm(dim=-1).max())
    return float(difference.abs().max())


def _size(key: str, expected: Tensor) -> float:
    """The farthest point from the origin in mm, or the largest number."""
    size = _error(key, expected, torch.zeros_like(expected))
    if not math.isfinite(size):
        raise WrongResult(f"{key} of the plain float32 network is not finite: weights or images are unusable")
    return size
