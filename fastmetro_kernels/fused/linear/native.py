"""The native backend of the fused linear layer: few rows, half precision, compute capability 9.0 (``csrc/linear/``).

The convolutions' product with the layer norm behind it: chunks of x and of the weight come through a ring of the copy
engine's, and the blocks of a cluster share a depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmetro_kernels import backends
from fastmetro_kernels.backends import assumed_constant
from fastmetro_kernels.fused.inference import aligned
from fastmetro_kernels.fused.linear.ops import NAMESPACE
from fastmetro_kernels.tuning.choice import family_of

OPERATOR = "fused_linear_native"
FAMILY = "9.0"
ROWS, DEPTH, MAX_STAGES, SHARED_BYTES = 64, 64, 16, 227 * 1024
COLUMNS, SPLITS = (32, 64), (1, 2, 4, 8)
PARTS_OF_LANE = 4
"""Parts of the features whose moments one of the COLUMNS / 8 lanes of a row merges."""


class NativeLinearConfig(NamedTuple):
    """How the native kernel cuts the output and the depth.

    Attributes:
        columns: features of a tile of 64 rows (32 or 64).
        split: blocks of a cluster that share the depth (1, 2, 4 or 8).
        stages: chunks of 64 of the depth under way at a time (2 to 16).
        early: whether to start before the kernel in front has ended. Constants are then read meanwhile.
    """

    columns: int
    split: int
    stages: int
    early: bool = True


MEASURED: dict[tuple[int, int, int], NativeLinearConfig] = {
    (49, 512, 2048): NativeLinearConfig(64, 4, 8, True),  # 3.09 us of 1, others 4.71
    (50, 128, 512): NativeLinearConfig(32, 4, 2, True),  # 1.91 us of 1, others 2.00
    (50, 512, 2048): NativeLinearConfig(64, 4, 8, True),
    (50, 2048, 512): NativeLinearConfig(64, 2, 4, True),
    (445, 512, 2048): NativeLinearConfig(64, 2, 8, True),
}
"""(rows, features, width) -> the fastest tile, where it is faster than the Triton kernel: on an H200, in float16. By
itself where there is a time; else in everything behind the backbone (``python -m bench.fused.place``)."""


class Given(NamedTuple):
    """Arguments of a call as one batch; see ``fused_linear``."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    leading: Tensor | None
    normalize: float | None
    moments: Tensor | None
    weight_sums: Tensor | None
    out_dtype: torch.dtype


def _ring_bytes(config: NativeLinearConfig) -> int:
    return config.stages * (ROWS + config.columns) * DEPTH * 2


def shared_bytes(config: NativeLinearConfig) -> int:
    """As in ``csrc/linear/linear.cuh``."""
    sums = ROWS * (config.columns + 8) * 4 if config.split > 1 else 0
    return _ring_bytes(config) + sums + (2 * MAX_STAGES + 1) * 8 + 1024


def problem(config: NativeLinearConfig) -> str | None:
    """What makes this configuration impossible, or None."""
    for name, accepted in (("columns", COLUMNS), ("split", SPLITS), ("early", (False, True))):
        if (value := getattr(config, name)) not in accepted:
            return f"{name} must be one of {', '.join(map(str, accepted))}, got {value!r}"
    if not 2 <= config.stages <= MAX_STAGES or shared_bytes(config) > SHARED_BYTES:
        return f"stages must be 2 to {MAX_STAGES} and fit {SHARED_BYTES} bytes of shared memory, got {config.stages}"
    return None


def usable(rows: int, features: int, width: int) -> list[NativeLinearConfig]:
    """All that make sense for a size: several blocks for a depth only where there are fewer tiles than 264."""
    chunks, found = -(-width // DEPTH), []
    for columns in COLUMNS:
        tiles = -(-rows // ROWS) * -(-features // columns)
        for split in SPLITS:
            share = max(-(-chunks // split), 2)
            if split > chunks or (split > 1 and tiles * split > 264) or (columns > features > COLUMNS[0]):
                continue
            counts = {count for count in (2, 4, 6, 8, share) if count <= share}
            configs = [NativeLinearConfig(columns, split, min(count, MAX_STAGES)) for count in sorted(counts)]
            found += [config for config in dict.fromkeys(configs) if problem(config) is None]
    return found


def reasons(given: Given, config: NativeLinearConfig | None = None) -> list[str]:
    """Why the kernel cannot take a call; empty when it can."""
    found = list(_device_reasons(given.x.device, given.x.dtype))
    x, weight, bias, residual, leading, normalize, moments, _, out_dtype = given
    if weight.dtype != x.dtype or out_dtype != x.dtype:
        found.append(f"takes weights and gives results of x's dtype, got {weight.dtype} and {out_dtype}")
    features, width = weight.shape
    if width % 16 or features % 16:
        found.append(f"K and N must be multiples of 16, got {width} and {features}")
    if bias is None or bias.dtype != x.dtype:
        found.append(f"needs a bias of x's dtype, got {None if bias is None else bias.dtype}")
    if leading is not None and (len(x) != 1 or x.shape[1] == 0 or moments is not None):
        found.append("takes leading tokens of one sample that has others, and not together with moments")
    if leading is not None and leading.dtype != x.dtype:
        found.append(f"takes leading tokens of x's dtype, got {leading.dtype}")
    if normalize is not None and moments is None:
        found.append("takes the moments of a layer norm, and does not make them")
    parts = PARTS_OF_LANE * (config.columns if config else COLUMNS[0]) // 8
    if moments is not None and moments.shape[-2] > parts:
        found.append(f"takes moments of up to {parts} parts, got {moments.shape[-2]}")
    if residual is not None and residual.dtype != x.dtype:
        found.append(f"takes a residual of x's dtype, got {residual.dtype}")
    named = {
        "x": x, "weight": weight, "bias": bias, "residual": residual, "leading": leading, "moments": moments
    }  # fmt: skip
    for name, tensor in named.items():
        if tensor is not None and not (tensor.is_contiguous() and aligned(tensor, 16)):
            found.append(f"{name} must be contiguous and aligned to 16 bytes")
    return found


@assumed_constant
def _device_reasons(device: torch.device, dtype: torch.dtype) -> list[str]:
    return backends.hopper_reasons(OPERATOR, device, dtype)


def plain(given: Given) -> NativeLinearConfig:
    """A tile that every size can have."""
    return NativeLinearConfig(COLUMNS[0], 1 if given.weight.shape[1] <= DEPTH else 2, 4)


def choose(given: Given) -> NativeLinearConfig | None:
    """The tile with which ``auto`` runs this kernel, or None: Triton is to take the call."""
    x, weight = given.x, given.weight
    config = MEASURED.get((x.shape[0] * x.shape[1], *weight.shape))
    if config is None or family_of(x.device) != FAMILY or reasons(given, config):
        return None
    return config


torch.library.define(
    f"{NAMESPACE}::{OPERATOR}",
    "(Tensor x, Tensor weight, Tensor bias, Tensor? residual, Tensor? leading, float epsilon, Tensor? moments, "
    "Tensor? weight_sums, bool relu, bool give_moments, int[] config) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake(f"{NAMESPACE}::{OPERATOR}")
def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    leading: Tensor | None,
    epsilon: float,
    moments: Tensor | None,
    weight_sums: Tensor | None,
    relu: bool,
    give_moments: bool,
    config: Sequence[int],
) -> tuple[Tensor, Tensor]:
    torch._check(
        x.dim() == 2 and weight.dim() == 2 and weight.size(1) == x.size(1), lambda: "x [rows, K], weight [N, K]"
    )
    rows, features = x.size(0) + (0 if leading is None else leading.size(0)), weight.size(0)
    tiles = -(-features // config[0]) if give_moments else 0
    return x.new_empty((rows, features)), x.new_empty((rows, tiles, 3), dtype=torch.float32)


def linear(
    given: Given, relu: bool, give_moments: bool, constant_weights: bool, config: NativeLinearConfig
) -> tuple[Tensor, Tensor]:
    """Result [B, P + M, N] and moments [B, P + M, tiles or 0, 3]; of a call without `reasons`.

    The kernel reads weight and bias before the kernel in front has ended wherever it starts early.
    """
    config = config._replace(early=config.early and constant_weights)
    x, weight, bias, residual, leading, normalize, moments, sums, _ = given
    assert bias is not None
    out, made = torch.ops.fastmetro_kernels.fused_linear_native(
        x.flatten(0, 1), weight, bias, *(None if one is None else one.flatten(0, 1) for one in (residual, leading)),
        normalize or 0.0, None if moments is None else moments.flatten(0, 1), sums, relu, give_moments,
        list(map(int, config)),
    )  # fmt: skip
    tokens = (x.shape[0], x.shape[1] + (0 if leading is None else leading.shape[1]))
    return out.unflatten(0, tokens), made.unflatten(0, tokens)
