"""Launch configurations of the Triton attention kernels: which there are, which are pinned, how hub rows are split.

Nothing here needs Triton. Everything is a function of shapes, so that a call captured in a CUDA graph replays what it
launched, and equal calls give equal bits.
"""

from __future__ import annotations

from typing import NamedTuple

from fastmetro_kernels.schedule import WINDOW_SIZES

PASSES = ("forward", "backward")
KERNELS = {"forward": ("forward",), "backward": ("rows", "columns")}
"""The kernels of a pass, in the order of their tiles: the backward owns queries first (dq), then keys (dk, dv)."""

PADDED_DIMS = (16, 32, 64, 128)
PRECISIONS = ("ieee", "tf32x3")
"""How float32 numbers are multiplied; half precision has one way."""

HUB_ROWS = 16  # rows of a tile of hubs
MAX_SPLITS = 64  # one program adds up the shares of a tile of hubs: no more than so many
WHOLE = 1 << 30
"""As `share`: hub rows are never split."""

_TOGETHER = 512  # programs that a large GPU runs at a time, about: 130 multiprocessors, a few on each
_L2_BYTES = 32 << 20  # k and v up to this size stay in L2 however programs are ordered


class Config(NamedTuple):
    """One kernel: rows of a window, tile width (tokens streamed at a time), warps and pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


class TritonConfig(NamedTuple):
    """One pass.

    Attributes:
        tiles: a `Config` per kernel of the pass (see `KERNELS`).
        precision: one of `PRECISIONS`.
        share: tokens that one program sees of the dense rows (and columns) of the hubs; 0: see `hub_split`.
    """

    tiles: tuple[Config, ...]
    precision: str = "ieee"
    share: int = 0


# Pinned, because tuning at run time makes first calls slow and CUDA graphs fragile.
# (kernel, bytes per element) -> {padded head dim: configuration}
CONFIGS: dict[tuple[str, int], dict[int, Config]] = {
    ("forward", 2): {
        16: Config(16, 64, 1, 2), 32: Config(16, 64, 2, 2), 64: Config(64, 128, 4, 2), 128: Config(16, 64, 4, 2),
    },
    ("forward", 4): {
        16: Config(16, 64, 4, 1), 32: Config(16, 64, 4, 1), 64: Config(16, 32, 4, 1), 128: Config(16, 32, 8, 1),
    },
    ("rows", 2): {
        16: Config(16, 64, 2, 2), 32: Config(16, 64, 4, 2), 64: Config(16, 64, 4, 2), 128: Config(16, 64, 4, 2),
    },
    ("rows", 4): {
        16: Config(16, 64, 4, 1), 32: Config(16, 32, 4, 1), 64: Config(16, 16, 4, 1), 128: Config(16, 32, 8, 1),
    },
    ("columns", 2): {
        16: Config(16, 64, 2, 2), 32: Config(16, 64, 4, 2), 64: Config(16, 64, 4, 2), 128: Config(16, 64, 4, 2),
    },
    ("columns", 4): {
        16: Config(16, 64, 4, 1), 32: Config(16, 32, 4, 1), 64: Config(16, 16, 4, 1), 128: Config(16, 32, 8, 1),
    },
}  # fmt: skip


def padded_dim(dim: int) -> int:
    """The width that kernels give a head of `dim` numbers; `dim` may be symbolic.

    Raises:
        ValueError: `dim` is above 128.
    """
    for size in PADDED_DIMS:
        if dim <= size:
            return size
    raise ValueError(f"head dims go up to {PADDED_DIMS[-1]}, got {dim}")


def pinned(pass_name: str, element_size: int, dim: int) -> TritonConfig:
    """The configuration of a pass where no measurement names a better one."""
    return TritonConfig(tuple(CONFIGS[kernel, element_size][padded_dim(dim)] for kernel in KERNELS[pass_name]))


def problem(config: TritonConfig, pass_name: str) -> str | None:
    """What makes this configuration impossible, or None."""
    if len(config.tiles) != len(KERNELS[pass_name]):
        return f"{pass_name} has {len(KERNELS[pass_name])} kernels, got {len(config.tiles)} tiles"
    for tile in config.tiles:
        for name, value, accepted in zip(
            Config._fields, tile, (WINDOW_SIZES, (16, 32, 64, 128, 256), (1, 2, 4, 8), (1, 2, 3, 4)), strict=True
        ):
            if value not in accepted:
                return f"{name} must be one of {', '.join(map(str, accepted))}, got {value}"
    if config.precision not in PRECISIONS:
        return f"precision must be one of {', '.join(PRECISIONS)}, got {config.precision!r}"
    if not 0 <= config.share <= WHOLE:
        return f"share must be 0 to {WHOLE}, got {config.share}"
    return None


def slots_first(batch: int, tokens: int, heads: int, dim: int, element_size: int) -> bool:
    """Whether programs run over the batch before they run over the mesh.

    Then the hubs' programs, the longest, all begin first, and none of them is left alone at the end. But all of k and
    v passes by before the windows come to them, so it pays only where they stay in L2.
    """
    return 2 * batch * tokens * heads * dim * element_size <= _L2_BYTES


def hub_split(
    batch_heads: int, tokens: int, num_hubs: int, windows: int, keys: int, long_first: bool, share: int
) -> tuple[int, int]:
    """Shares into which all tokens are cut for the hubs' programs, and tokens of a share, a multiple of `keys`.

    A program of hubs sees all tokens of its share, one of a window only a tile of `keys` or two. While there are few
    programs each share is one tile; with many, the hubs' programs may take as long as all others take together
    (`long_first`: they begin first), or an eighth of that: the last of them then ends soon after the last window.

    Args:
        batch_heads: batch elements times heads.
        windows: programs of windows per head.
        keys: tokens of a tile.
        long_first: see `slots_first`.
        share: tokens of a share; 0 decides as above.
    """
    tiles = -(-tokens // keys)
    if share:
        length = -(-share // keys)
    else:
        steps = batch_heads * (windows + -(-num_hubs // HUB_ROWS) * tiles)
        length = steps // (_TOGETHER if long_first else 8 * _TOGETHER)
    length = min(max(length, 1, -(-tiles // MAX_SPLITS)), tiles)
    return -(-tiles // length), length * keys
