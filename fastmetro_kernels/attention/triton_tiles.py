"""Pieces shared by the Triton attention kernels: which tokens a tile reads, gathered loads, dropout bits.

A program owns a tile of tokens (queries in the row passes, keys in the column pass) of one head and batch element
and streams tiles of ``KEYS`` other tokens past it. What it owns follows from its slot:

* slots ``0 .. hub_tiles * splits - 1``: ``HUB_ROWS`` hub tokens against one contiguous share (split) of all tokens;
* the others: one window of ``ROWS`` vertices of the schedule against all hubs, then the window's gathered list.
"""

# Kernel arguments are pointers and scalars that only the compiler types, so they carry no annotations:
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from fastmetro_kernels.attention import configs

# The fewest rows that a tensor core instruction takes. Hubs are few (14 joints in FastMETRO), so their tiles stay so
# small however many rows a window has.
HUB_ROWS = tl.constexpr(configs.HUB_ROWS)


# Sizes of which the machine code does not depend: one kernel serves every mesh and batch.
UNSPECIALIZED = ["tokens", "num_hubs", "slots", "batches", "slots_first", "splits", "split_tokens", "threshold"]


@triton.jit
def program_place(heads, slots, batches, slots_first):
    """Batch element, head and slot of this program; heads run fastest, so that cache lines are shared.

    Then slots run, so that a batch element stays in L2 while it is worked on. With ``slots_first`` (1; else 0) slot 0
    of all batch elements comes before slot 1: the long programs, those of the hubs, begin before all others.
    """
    program = tl.program_id(0)
    head = program % heads
    rest = program // heads
    batch = tl.where(slots_first != 0, rest % batches, rest // slots)
    return batch.to(tl.int64), head, tl.where(slots_first != 0, rest // batches, rest % slots)


@triton.jit
def load_rows(base, tokens, valid, stride_token, stride_dim, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Gather rows ``[len(tokens), BLOCK_DIM]``; invalid rows and the padding of the head dimension are 0."""
    dim = tl.arange(0, BLOCK_DIM)
    mask = valid[:, None]
    if DIM < BLOCK_DIM:
        mask = mask & (dim < DIM)[None, :]
    offsets = tokens.to(tl.int64)[:, None] * stride_token + dim.to(tl.int64)[None, :] * stride_dim
    return tl.load(base + offsets, mask=mask, other=0.0)


@triton.jit
def store_rows(base, tokens, valid, stride_token, rows, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Scatter rows ``[len(tokens), BLOCK_DIM]`` to unit-stride rows of ``DIM``, in the dtype of the target."""
    dim = tl.arange(0, BLOCK_DIM)
    mask = valid[:, None]
    if DIM < BLOCK_DIM:
        mask = mask & (dim < DIM)[None, :]
    offsets = tokens.to(tl.int64)[:, None] * stride_token + dim[None, :]
    tl.store(base + offsets, rows.to(base.dtype.element_ty), mask=mask)


@triton.jit
def hub_share(slot, splits, split_tokens, tokens, num_hubs):
    """The hub tokens of a hub slot, which of them exist, and its share ``[begin, end)`` of all tokens."""
    hubs = slot // splits * HUB_ROWS + tl.arange(0, HUB_ROWS)
    begin = slot % splits * split_tokens
    return hubs, hubs < num_hubs, begin, tl.minimum(begin + split_tokens, tokens)


@triton.jit
def window_rows(window, row_order, key_offsets, num_hubs, ROWS: tl.constexpr):
    """The tokens of a window, which of them exist, and where its list begins and how long it is."""
    vertices = tl.load(row_order + window * ROWS + tl.arange(0, ROWS))
    begin = tl.load(key_offsets + window)
    return num_hubs + vertices, vertices >= 0, begin, tl.load(key_offsets + window + 1) - begin


@triton.jit
def dense_tile(first, end, KEYS: tl.constexpr):
    """Tokens ``first ..`` below ``end``, all of them visible to every hub."""
    tokens = first + tl.arange(0, KEYS)
    valid = tokens < end
    return tokens, valid, tl.broadcast_to(valid[None, :], (HUB_ROWS, KEYS))


@triton.jit
def listed_tile(first, keys, row_masks, list_begin, list_length, num_hubs, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Entries ``first ..`` of "all hubs, then the window's list", and which owned row sees which of them."""
    entry = first + tl.arange(0, KEYS)
    is_hub = entry < num_hubs
    in_list = (entry >= num_hubs) & (entry < num_hubs + list_length)
    position = list_begin + entry - num_hubs
    vertices = tl.load(keys + position, mask=in_list, other=-1)
    bits = tl.load(row_masks + position, mask=in_list, other=0)
    tokens = tl.where(is_hub, entry, num_hubs + vertices)
    bits = tl.where(is_hub, -1, bits)
    seen = ((bits[None, :] >> tl.arange(0, ROWS)[:, None]) & 1) != 0
    return tokens, is_hub | (vertices >= 0), seen


@triton.jit
def _mix32(x):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def dropout_keep(seed, batch_head, key_tokens, query_tokens, threshold):
    """Which weights stay: Philox2x32-7 (Salmon et al., SC 2011) of key and query token under a key of seed and head.

    ``key_tokens`` and ``query_tokens`` broadcast against each other; the bits depend on nothing else, so that row and
    column passes, and all backends, agree. A weight stays when its 32 bits are at least ``threshold`` (dropout
    probability times 2^32, in the bits of an int32).
    """
    state = tl.load(seed)
    low = state.to(tl.uint32)
    high = (state >> 32).to(tl.uint32)
    key = _mix32(_mix32(batch_head.to(tl.uint32) ^ low) + high)
    x0 = key_tokens.to(tl.uint32)
    x1 = query_tokens.to(tl.uint32)
    for _ in tl.static_range(7):
        product = x0.to(tl.uint64) * 0xD256D193
        x0 = (product >> 32).to(tl.uint32) ^ key ^ x1
        x1 = product.to(tl.uint32)
        key += 0x9E3779B9
    return x0 >= threshold.to(tl.uint32)
