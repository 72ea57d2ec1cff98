"""`TokenTopology`: which token may attend to which, as neighbour lists of a mesh plus dense hub tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastmetro_kernels import adjacency as lists
from fastmetro_kernels.few import build_few
from fastmetro_kernels.packing import PackedPlan, pack
from fastmetro_kernels.plan import BACKWARD, FORWARD, FORWARD_NARROW, Plan, Shape, build_plan, resident_shape
from fastmetro_kernels.schedule import WINDOW_ROWS, WINDOW_SIZES, Schedule, build_schedule, locality_order

ORDERS = ("natural", "locality")


_PLANS = {"forward": FORWARD, "forward_narrow": FORWARD_NARROW, "backward": BACKWARD}


class TokenTopology(nn.Module):
    """The attention pattern of mesh transformers: hub tokens that see all, vertices that see their neighbours.

    Tokens are numbered hubs first: hubs are tokens 0 to `num_hubs - 1`, vertex `i` is token `num_hubs + i`. Every
    token may attend to every hub and every hub to every token; a vertex may attend to the vertices of its list
    (itself included only if listed, as `from_faces` and `from_edges` do). In FastMETRO the hubs are the joints and
    the lists are the edges of the coarse mesh (Cho et al., ECCV 2022, section 3.3, "attention masking").

    All tensors are non-persistent buffers: they follow `.to()`, pickling, copying and export, and add nothing to
    `state_dict()`. Everything is checked here, once, and never again in a call.

    Attributes:
        num_hubs, num_vertices, num_tokens: Counts; `num_tokens` is their sum L.
        max_degree: Length of the longest list.
        symmetric: Whether j is in the list of i whenever i is in the list of j.
        order: `"natural"` or `"locality"`: in which order kernels process the rows. Never changes the numbering.
        row_offsets, columns: int32 [N + 1] and [nnz]; vertex `i` may attend to the vertices
            `columns[row_offsets[i]:row_offsets[i + 1]]`, sorted, without duplicates.
        t_row_offsets, t_columns: The same for the transpose: who may attend to vertex `j`.
        group_rows, group_entries, groups: The rows sorted by list length and padded to powers of two, for code that
            needs rectangles: `groups` holds a tuple (rows, width) per group, `group_rows` int64 [N] the
            rows and `group_entries` int64 [sum of rows * width] the positions in `columns`; a padded row repeats
            its last entry. `group_padding` (bool, the same length) marks the repeats.

    Args:
        row_offsets, columns: The lists (arrays, tensors or lists of integers; duplicates are merged).
        num_hubs: 0 to 64.
        symmetric: True promises symmetric lists; others are then refused.
        order: See above. `"locality"` costs a spectral bisection (about 25 microseconds per vertex).

    Raises:
        TypeError: indices or `num_hubs` that are not integers.
        ValueError: indices out of range, more than 64 hubs, broken offsets, lists that are not symmetric although
            promised, more than 2^31 - 1 entries, an unknown `order`.
    """

    row_offsets: Tensor
    columns: Tensor
    t_row_offsets: Tensor
    t_columns: Tensor
    few_pairs: Tensor | None
    group_rows: Tensor
    group_entries: Tensor
    group_padding: Tensor

    def __init__(
        self, row_offsets: Any, columns: Any, num_hubs: int = 0, symmetric: bool = True, order: str = "natural"
    ) -> None:
        super().__init__()
        if order not in ORDERS:
            raise ValueError(f"order={order!r} is not known; accepted: {', '.join(map(repr, ORDERS))}")
        self.num_hubs = lists.check_num_hubs(num_hubs)
        offsets, indices = lists.check_lists(row_offsets, columns)
        pair = lists.check_symmetric(offsets, indices)
        if pair is not None and symmetric:
            raise ValueError(
                f"symmetric=True was promised, but vertex {pair[0]} may attend to vertex {pair[1]} and not the "
                "other way round; pass symmetric=False to allow this"
            )
        self.num_vertices = len(offsets) - 1
        self.num_tokens = self.num_hubs + self.num_vertices
        self.max_degree = int(np.diff(offsets).max(initial=0))
        self.symmetric = pair is None
        self.order = order
        self._set_lists("", offsets, indices)
        self._set_lists("t_", *_transposed(offsets, indices))
        self._set_groups(offsets)
        self._set_schedules()
        self.register_buffer("few_pairs", None, persistent=False)  # see `few.py`; on CUDA devices only
        self._plan_sizes: dict[str, tuple[int, int]] | None = None  # None: not built, {}: the pattern has no plan

    def _set_lists(self, prefix: str, offsets: np.ndarray, indices: np.ndarray) -> None:
        for name, array in (("row_offsets", offsets), ("columns", indices)):
            self.register_buffer(prefix + name, torch.from_numpy(array.astype(np.int32)), persistent=False)

    def _set_groups(self, offsets: np.ndarray) -> None:
        degrees = np.diff(offsets)
        widths = np.where(degrees > 0, 2 ** np.ceil(np.log2(np.maximum(degrees, 1))).astype(np.int64), 0)
        rows: list[np.ndarray] = []
        entries: list[np.ndarray] = []
        padding: list[np.ndarray] = []
        groups: list[tuple[int, int]] = []
        for width in np.unique(widths):
            members = np.flatnonzero(widths == width)
            steps = np.arange(width)[None, :]
            last = degrees[members, None] - 1
            rows.append(members)
            entries.append((offsets[members, None] + np.minimum(steps, last)).ravel())
            padding.append((steps > last).ravel())
            groups.append((len(members), int(width)))
        self.groups = tuple(groups)
        for name, parts, dtype in (
            ("group_rows", rows, np.int64),
            ("group_entries", entries, np.int64),
            ("group_padding", padding, np.bool_),
        ):
            array = np.concatenate([np.zeros(0, dtype), *parts])
            self.register_buffer(name, torch.from_numpy(array), persistent=False)

    def _set_schedules(self) -> None:
        order = self.locality_order() if self.order == "locality" else None
        built = {"schedule_": build_schedule(self.row_offsets, self.columns, order)}
        if not self.symmetric:
            built["t_schedule_"] = build_schedule(self.t_row_offsets, self.t_columns, order)
        for rows in WINDOW_SIZES[1:]:
            built[f"schedule{rows}_"] = build_schedule(self.row_offsets, self.columns, order, rows)
            if not self.symmetric:
                built[f"t_schedule{rows}_"] = build_schedule(self.t_row_offsets, self.t_columns, order, rows)
        self._schedule_sizes = {prefix: (one.longest, one.mean) for prefix, one in built.items()}
        for prefix, one in built.items():
            for name, tensor in zip(Schedule._fields[:4], one[:4], strict=True):
                self.register_buffer(prefix + name, tensor, persistent=False)

    def _schedule(self, prefix: str) -> Schedule:
        row_order, key_offsets, keys, row_masks = (getattr(self, prefix + name) for name in Schedule._fields[:4])
        return Schedule(row_order, key_offsets, keys, row_masks, *self._schedule_sizes[prefix])

    @property
    def schedule(self) -> Schedule:
        """Windows of 16 rows with the keys they gather, in processing order, on the device of the topology."""
        return self._schedule("schedule_")

    @property
    def t_schedule(self) -> Schedule:
        """The same for the transposed pattern (windows of keys with the rows that use them)."""
        return self._schedule("schedule_" if self.symmetric else "t_schedule_")

    def schedule_of(self, rows: int) -> Schedule:
        """`schedule` with windows of 16, 32 or 64 rows.

        Raises:
            ValueError: another number of rows.
        """
        if rows not in WINDOW_SIZES:
            raise ValueError(f"rows must be one of {', '.join(map(str, WINDOW_SIZES))}, got {rows}")
        return self._schedule("schedule_" if rows == WINDOW_ROWS else f"schedule{rows}_")

    def t_schedule_of(self, rows: int) -> Schedule:
        """`t_schedule` with windows of 16, 32 or 64 keys; raises as `schedule_of` does."""
        if self.symmetric or rows not in WINDOW_SIZES:
            return self.schedule_of(rows)
        return self._schedule("t_schedule_" if rows == WINDOW_ROWS else f"t_schedule{rows}_")

    def make_plan(self, shape: Shape = FORWARD) -> Plan | None:
        """The plan by which a CUDA kernel walks over this pattern, on the CPU, or None where there is none.

        It always follows the locality order: the order of processing never changes results.
        """
        return build_plan(*self._plan_schedules(), self.num_hubs, shape)

    def _plan_schedules(self) -> tuple[Schedule, Schedule]:
        """Of the rows and of the transposed pattern in locality order; one object where the pattern is symmetric."""
        if self.order == "locality":
            forward = self.schedule
            return forward, forward if self.symmetric else self.t_schedule
        order = self.locality_order()
        forward = build_schedule(self.row_offsets, self.columns, order)
        return forward, forward if self.symmetric else build_schedule(self.t_row_offsets, self.t_columns, order)

    def _apply(self, fn: Any, recurse: bool = True) -> TokenTopology:
        """Moving to a CUDA device also makes the plans of its kernels, which nothing else needs."""
        super()._apply(fn, recurse)
        if self.columns.is_cuda and self._plan_sizes is None:
            self._set_plans()
        return self

    def _set_plans(self) -> None:
        self._plan_sizes = {}
        schedules = self._plan_schedules()
        few = build_few(schedules[0], self.num_hubs)
        self.register_buffer("few_pairs", None if few is None else few.to(self.columns.device), persistent=False)
        shapes = dict(_PLANS)
        for kernel in ("forward", "backward"):
            resident = resident_shape(self.num_vertices, self.num_hubs, kernel == "backward")
            if resident is not None:
                shapes[f"{kernel}_resident"] = resident
        for name, shape in shapes.items():
            plan = build_plan(*schedules, self.num_hubs, shape)
            if plan is None:
                self._plan_sizes = {}
                return
            packed = pack(plan, backward=name.startswith("backward"))
            self._plan_sizes[name] = (packed.slots, packed.windows)
            for field, tensor in zip(PackedPlan._fields[:-2], packed[:-2], strict=True):
                self.register_buffer(f"{name}_plan_{field}", tensor.to(self.columns.device), persistent=False)

    def plan(self, name: str) -> PackedPlan | None:
        """The plan for a CUDA kernel, on the device of the topology.

        None on other devices than CUDA, and where the pattern has none.

        Args:
            name: `"forward"`, `"forward_narrow"` (heads below 64), `"backward"`, or `"forward_resident"` and
                `"backward_resident"`, which only small meshes have (see `resident_shape` of plan.py).
        """
        if not self._plan_sizes or name not in self._plan_sizes:
            return None
        tensors = {field: getattr(self, f"{name}_plan_{field}") for field in PackedPlan._fields[:-2]}
        slots, windows = self._plan_sizes[name]
        return PackedPlan(**tensors, slots=slots, windows=windows)

    @classmethod
    def from_faces(
        cls, faces: Any, num_vertices: int | None = None, num_hubs: int = 0, order: str = "natural"
    ) -> TokenTopology:
        """Vertices see themselves and the vertices they share a triangle edge with.

        Args:
            faces: Integers [F, 3], array, tensor or nested list.
            num_vertices: N; by default the largest index + 1. Vertices of no face see themselves (and the hubs).
            num_hubs: 0 to 64.
            order: `"natural"` or `"locality"`, the processing order.

        Raises:
            TypeError: `faces` does not hold integers.
            ValueError: wrong shape, or an index that is negative or not below `num_vertices`.
        """
        return cls(*lists.lists_from_faces(faces, num_vertices), num_hubs=num_hubs, order=order)

    @classmethod
    def from_edges(
        cls, edges: Any, num_vertices: int | None = None, num_hubs: int = 0, order: str = "natural"
    ) -> TokenTopology:
        """Vertices see themselves and both ends of every edge [E, 2] see each other; otherwise as `from_faces`."""
        return cls(*lists.lists_from_edges(edges, num_vertices), num_hubs=num_hubs, order=order)

    @classmethod
    def from_adjacency(
        cls, adjacency: Any, num_hubs: int = 0, symmetric: bool = True, order: str = "natural"
    ) -> TokenTopology:
        """Vertex i may attend to vertex j where `adjacency[i, j]` is not zero. Nothing is added: no self loops.

        Args:
            adjacency: Square [N, N]: SciPy sparse, NumPy or torch (dense, COO, CSR, CSC); numbers or booleans.
                Stored zeros do not count, repeated entries are merged.
            num_hubs: 0 to 64; hubs are additional to the N vertices.
            symmetric: True promises a symmetric pattern.
            order: `"natural"` or `"locality"`, the processing order.

        Raises:
            TypeError: entries that are not numbers or booleans, or a tensor of another layout.
            ValueError: not square, NaN or infinite values, indices out of range, broken CSR or CSC offsets, or a
                pattern that is not symmetric although promised.
        """
        return cls(*lists.lists_from_adjacency(adjacency), num_hubs=num_hubs, symmetric=symmetric, order=order)

    @classmethod
    def from_mask(cls, mask: Any, num_hubs: int | None = None, order: str = "natural") -> TokenTopology:
        """From the whole mask, True where a query (row) may attend to a key (column), as in SDPA.

        Args:
            mask: Boolean [L, L], array, tensor or nested list; any pattern, symmetric or not.
            num_hubs: How many of the first tokens are hubs; verified. None finds the largest number up to 64
                such that the first rows and the first columns are all True.
            order: `"natural"` or `"locality"`, the processing order.

        Raises:
            TypeError: `mask` is not boolean.
            ValueError: not square, or `num_hubs` tokens are not all dense.
        """
        offsets, columns, hubs = lists.lists_from_mask(mask, num_hubs)
        return cls(offsets, columns, num_hubs=hubs, symmetric=False, order=order)

    @property
    def nnz(self) -> int:
        """Number of entries in all lists (vertex to vertex, self loops included)."""
        return self.columns.numel()

    def degrees(self) -> Tensor:
        """int32 [N]: how many vertices each vertex may attend to."""
        return self.row_offsets[1:] - self.row_offsets[:-1]

    def rows(self) -> Tensor:
        """int64 [nnz]: the vertex that each entry of `columns` belongs to. Needs no synchronisation."""
        vertices = torch.arange(self.num_vertices, device=self.columns.device)
        return torch.repeat_interleave(vertices, self.degrees(), output_size=self.nnz)

    def mask(self) -> Tensor:
        """The whole mask, bool [L, L], True where a query may attend: for oracles and small meshes."""
        dense = torch.zeros(self.num_tokens, self.num_tokens, dtype=torch.bool, device=self.columns.device)
        dense[: self.num_hubs] = True
        dense[:, : self.num_hubs] = True
        dense[self.num_hubs + self.rows(), self.num_hubs + self.columns.long()] = True
        return dense

    def locality_order(self) -> Tensor:
        """A permutation, int64 [N] on the CPU, that puts neighbouring vertices close together.

        Recursive spectral bisection (see `bisection.py`), the same on every machine. `permute(locality_order())`
        renumbers the vertices by it; `order="locality"` only processes them so.
        """
        return locality_order(self.row_offsets, self.columns)

    def permute(self, order: Any) -> TokenTopology:
        """The same pattern with new vertex numbers: vertex `i` of the result is vertex `order[i]` of this one.

        Tokens follow as `torch.cat([x[:, :hubs], x[:, hubs:][:, order]], 1)`; hubs stay in front.

        Raises:
            TypeError: `order` does not hold integers.
            ValueError: `order` is not a permutation of 0 to N - 1.
        """
        new = lists.as_numpy("order", order)
        if new.dtype.kind not in "iu" and new.size:
            raise TypeError(f"order must hold integers, got {new.dtype}")
        if new.shape != (self.num_vertices,) or not np.array_equal(np.sort(new), np.arange(self.num_vertices)):
            raise ValueError(f"order must be a permutation of 0 to {self.num_vertices - 1}")
        old_offsets, old_columns = self.row_offsets.cpu().numpy(), self.columns.cpu().numpy()
        inverse = np.argsort(new)
        degrees = np.diff(old_offsets)[new]
        offsets = np.concatenate([[0], np.cumsum(degrees)])
        steps = np.arange(len(old_columns)) - np.repeat(offsets[:-1], degrees)
        columns = inverse[old_columns[np.repeat(old_offsets[:-1][new], degrees) + steps]]
        result = TokenTopology(offsets, columns, self.num_hubs, symmetric=self.symmetric, order=self.order)
        return result.to(self.columns.device)

    def extra_repr(self) -> str:
        """Counts and pattern, shown by `repr`."""
        return (
            f"num_hubs={self.num_hubs}, num_vertices={self.num_vertices}, nnz={self.nnz}, "
            f"symmetric={self.symmetric}, order={self.order!r}"
        )


def _transposed(offsets: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lists of the transposed pattern; the stable sort keeps each list sorted."""
    count = len(offsets) - 1
    rows = np.repeat(np.arange(count, dtype=np.int64), np.diff(offsets))
    by_column = np.argsort(columns, kind="stable")
    degrees = np.bincount(columns, minlength=count) if count else np.zeros(0, np.int64)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(degrees)]), rows[by_column]
