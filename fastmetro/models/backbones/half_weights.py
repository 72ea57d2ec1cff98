"""Half-precision copies of convolutions' weights, which the optimizer writes with the weights themselves.

Autocast casts every weight in every forward pass, and its gradient back in every backward pass. With a copy neither is
needed: `overlap.py` takes the copy, and leaves the gradient, as it was computed, in the copy's ``grad``.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fastmetro_kernels.adamw import same_layout

_KEPT = "half_copy"


class HalfCopy:
    """Of a parameter, as its attribute ``half_copy``.

    It is used only while an optimizer exists that has claimed it: one that takes its gradient and rewrites it. It knows
    which version of the parameter it is a copy of. Whoever changes a parameter otherwise (``load_state_dict``, an
    operation in place, ``module.to``) makes it another version, and the copy is made anew before it is used. What
    PyTorch does not count, writes through ``parameter.data``, collectives and replays of CUDA graphs, must be followed
    by :func:`refresh_half_weights` unless the copy was written, too.

    Attributes:
        tensor: leaf with the shape, strides and device of the parameter. Its ``grad`` is the parameter's gradient, or a
            part of it: what is in the parameter's own ``grad`` adds to it.
    """

    def __init__(self, parameter: Tensor, dtype: torch.dtype) -> None:
        self.tensor = parameter.detach().to(dtype)
        self._seen = self._look(parameter)
        self._owner: weakref.ref[object] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {"tensor": self.tensor, "_seen": None, "_owner": None}  # another process has other addresses

    @staticmethod
    def _look(parameter: Tensor) -> tuple[int, int]:
        return parameter._version, parameter.data_ptr()

    def claim(self, owner: object) -> None:
        """From now on, and as long as it exists, this optimizer takes the gradient and writes the copy."""
        if self._owner is None or self._owner() is not owner:
            self._owner = weakref.ref(owner)

    @property
    def claimed(self) -> bool:
        """Whether such an optimizer exists."""
        return self._owner is not None and self._owner() is not None

    def fits(self, parameter: Tensor) -> bool:
        """Whether it can be written together with the parameter: the same device and strides."""
        return self.tensor.device == parameter.device and same_layout(self.tensor, parameter)

    def is_stale(self, parameter: Tensor) -> bool:
        """Whether the parameter is not the one that was copied, as far as PyTorch knows."""
        return self._seen != self._look(parameter)

    @torch.no_grad()
    def refresh(self, parameter: Tensor) -> None:
        """Copy the parameter anew; into the same memory, if that fits."""
        if self.fits(parameter):
            self.tensor.copy_(parameter)
        else:
            self.settle(parameter)
            leaf = self.tensor.requires_grad
            self.tensor = parameter.detach().to(self.tensor.dtype).requires_grad_(leaf)
        self.written(parameter)

    def written(self, parameter: Tensor) -> None:
        """Someone has just written both."""
        self._seen = self._look(parameter)

    @torch.no_grad()
    def settle(self, parameter: Tensor) -> None:
        """Put the copy's gradient into the parameter's, in the parameter's dtype."""
        gradient, self.tensor.grad = self.tensor.grad, None
        if gradient is None:
            return
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(gradient)
        else:
            parameter.grad.add_(gradient)


class KeptFresh:
    """The copies of some parameters, made anew where they are stale: asked of all in front of every replay of a graph,
    which asks nothing itself.

    A copy that was fresh stays so as long as its parameter has the same version and address. Those of all parameters
    are compared at once, because the device waits for it.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._pairs = kept_weights(parameters)
        self._parameters = [parameter for parameter, _ in self._pairs]
        self._seen: tuple[list[int], list[int]] | None = None

    def _look(self) -> tuple[list[int], list[int]]:
        versions = list(map(operator.attrgetter("_version"), self._parameters))
        return versions, list(map(Tensor.data_ptr, self._parameters))

    def refresh(self) -> None:
        """Make stale copies anew, into the same memory where they fit."""
        seen = self._look()
        if seen == self._seen:
            return
        for parameter, kept in self._pairs:
            if kept.is_stale(parameter):
                kept.refresh(parameter)
        self._seen = seen


def keep_half_weights(module: nn.Module, dtype: torch.dtype | None = torch.bfloat16) -> int:
    """Keep half-precision copies of the weights of a module's convolutions; with None let go of them.

    They come into use with :class:`~fastmetro.training.optimizer.ClippedAdamW` over the weights and with
    :func:`~fastmetro.models.backbones.overlap.overlap_weight_gradients`, under autocast to the same dtype. Then
    ``weight.grad`` stays None: gradients are cleared by ``optimizer.zero_grad()``, not by ``module.zero_grad()``.

    The copies are no part of the module: neither of its ``state_dict`` nor of its buffers. ``copy.deepcopy`` of the
    module has none, and behaves as if there never were any. ``module.to(...)`` keeps them; they follow when they are
    used.

    Args:
        module: with float32 weights.
        dtype: bfloat16, float16, or None.

    Returns:
        How many convolutions the module has.

    Raises:
        TypeError: another dtype, or weights that are not float32.
    """
    weights = [layer.weight for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    keep_copies(weights, dtype)
    return len(weights)


def keep_copies(weights: Sequence[Tensor], dtype: torch.dtype | None) -> None:
    """Keep copies of these weights, or with None let go of them; raises as :func:`keep_half_weights`."""
    if dtype not in (torch.bfloat16, torch.float16, None):
        raise TypeError(f"dtype must be torch.bfloat16, torch.float16 or None, got {dtype}")
    wrong = next((weight.dtype for weight in weights if weight.dtype != torch.float32), None)
    if dtype is not None and wrong is not None:
        raise TypeError(f"weights must be float32, got {wrong}")
    for weight in weights:
        kept = half_copy(weight)
        if kept is not None:
            kept.settle(weight)
            delattr(weight, _KEPT)
        if dtype is not None:
            setattr(weight, _KEPT, HalfCopy(weight, dtype))


def refresh_half_weights(module: nn.Module) -> int:
    """Make all copies of a module's weights anew, into the same memory; returns how many there are."""
    found = kept_weights(module.parameters())
    for weight, kept in found:
        kept.refresh(weight)
    return len(found)


def half_copy(parameter: Tensor) -> HalfCopy | None:
    """The copy of a parameter, if one is kept."""
    return getattr(parameter, _KEPT, None)


def kept_weights(parameters: Iterable[Tensor]) -> list[tuple[Tensor, HalfCopy]]:
    """The parameters that have copies, and these."""
    found = ((parameter, half_copy(parameter)) for parameter in parameters)
    return [(parameter, kept) for parameter, kept in found if kept is not None]


def gradient_of(parameter: Tensor) -> Tensor | None:
    """The gradient of a parameter, its own or its copy's; where both have one, the sum, which becomes its own."""
    kept = half_copy(parameter)
    if kept is None or kept.tensor.grad is None:
        return parameter.grad
    if parameter.grad is None:
        return kept.tensor.grad
    kept.settle(parameter)
    return parameter.grad


def usable_copy(parameter: Tensor, dtype: torch.dtype) -> HalfCopy | None:
    """The copy in this dtype, if one is kept and an optimizer writes it."""
    kept = half_copy(parameter)
    return kept if kept is not None and kept.tensor.dtype == dtype and kept.claimed else None
