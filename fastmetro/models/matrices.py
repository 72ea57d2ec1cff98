"""Which tensor a layer multiplies by: its own matrix, or for one forward pass another one that stands for it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

_IN_PLACE = "in_place_of_the_matrix"


class _InPlace:
    """Holds the tensor out of sight of the module's parameters, buffers, copies and pickles."""

    def __init__(self, tensor: Tensor | None = None) -> None:
        self.tensor = tensor

    def __deepcopy__(self, _memo: Any) -> _InPlace:
        return _InPlace()

    def __reduce__(self) -> tuple[type[_InPlace], tuple[()]]:
        return _InPlace, ()


def take(owner: nn.Module, tensor: Tensor | None) -> None:
    """Let a layer take this tensor for its matrix; with None its own again."""
    found: _InPlace | None = getattr(owner, _IN_PLACE, None)
    if found is None:
        setattr(owner, _IN_PLACE, _InPlace(tensor))
    else:
        found.tensor = tensor


def matrix_of(owner: nn.Module, own: Tensor) -> Tensor:
    """What a layer multiplies by; `own` is its matrix."""
    found: _InPlace | None = getattr(owner, _IN_PLACE, None)
    return own if found is None or found.tensor is None else found.tensor
