"""The constants of the decoder tail."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TailWeights(NamedTuple):
    """Five linear layers, each a weight [N, K] and a bias [N]: C features, F hidden ones.

    Attributes:
        out_weight, out_bias: behind the self-attention, [C, C] and [C].
        query_weight, query_bias: of the cross-attention, [C, C] and [C], with the gain and shift of its norm folded in.
        cross_weight, cross_bias: behind the cross-attention, [C, C] and [C].
        expand_weight, expand_bias: of the feed-forward block, [F, C] and [F], with its norm folded in.
        contract_weight, contract_bias: likewise, [C, F] and [C].
    """

    out_weight: Tensor
    out_bias: Tensor
    query_weight: Tensor
    query_bias: Tensor
    cross_weight: Tensor
    cross_bias: Tensor
    expand_weight: Tensor
    expand_bias: Tensor
    contract_weight: Tensor
    contract_bias: Tensor

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """What the shapes have to be, by the C of out_weight and the F of expand_weight."""
        width, hidden = self.out_weight.shape[0], self.expand_weight.shape[0]
        square: dict[str, tuple[int, ...]] = {}
        for name in ("out", "query", "cross"):
            square |= {f"{name}_weight": (width, width), f"{name}_bias": (width,)}
        return square | {
            "expand_weight": (hidden, width),
            "expand_bias": (hidden,),
            "contract_weight": (width, hidden),
            "contract_bias": (width,),
        }
