"""The attention kernels of ``csrc/attention`` on CPU tensors, through the emulator."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from emulation import build
from torch import Tensor

from fastmetro_kernels import TokenTopology
from fastmetro_kernels.attention import dropout
from fastmetro_kernels.few import build_few
from fastmetro_kernels.packing import PackedPlan, pack
from fastmetro_kernels.plan import BACKWARD, FORWARD, FORWARD_NARROW, Shape, resident_shape


class _Plan(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("steps", "loads", "restarts", "records", "hub_chunks", "extra_chunks")),
        *((name, ctypes.c_int32) for name in ("record_bytes", "slots", "windows", "steps_count")),
        *((name, ctypes.c_int32) for name in ("steps_per_segment", "segments")),
    ]


class _Sizes(ctypes.Structure):
    _fields_ = [("batch", ctypes.c_int64), *((name, ctypes.c_int32) for name in ("tokens", "heads", "dim", "hubs"))]


class _Strided(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "head")),
        ("token_bytes", ctypes.c_int32),
    ]


class _Dropout(ctypes.Structure):
    _fields_ = [("seed", ctypes.c_void_p), ("threshold", ctypes.c_uint32), ("keep_scale", ctypes.c_float)]


class _Forward(ctypes.Structure):
    _fields_ = [
        ("plan", _Plan),
        ("sizes", _Sizes),
        ("q", _Strided),
        ("kv", _Strided * 2),
        *((name, ctypes.c_void_p) for name in ("out", "lse", "partials")),
        ("scale", ctypes.c_float),
        ("sign", ctypes.c_uint32),
        ("dropout", _Dropout),
    ]


class _FewForward(ctypes.Structure):
    _fields_ = [("forward", _Forward), ("pairs", ctypes.c_void_p), ("num_pairs", ctypes.c_int32)]


class _Backward(ctypes.Structure):
    _fields_ = [
        ("plan", _Plan),
        ("sizes", _Sizes),
        ("inputs", _Strided * 5),
        ("lse", ctypes.c_void_p),
        ("grad_lse", ctypes.c_void_p),
        ("grads", ctypes.c_void_p * 3),
        ("partials", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("scale_log2e", ctypes.c_float),
        ("transposed", ctypes.c_int32),
        ("transposed_extras", ctypes.c_int32),
        ("dropout", _Dropout),
    ]


class _FewBackward(ctypes.Structure):
    _fields_ = [("backward", _Backward), ("pairs", ctypes.c_void_p), ("num_pairs", ctypes.c_int32)]


@functools.cache
def _harness() -> build.Harness:
    return build.build_harness(Path(__file__).with_name("attention_harness.cpp"))


def _padded_dim(dim: int) -> int:
    return next(size for size in (16, 32, 64, 128) if dim <= size)


def _plan(plan: PackedPlan, steps_per_segment: int) -> _Plan:
    steps = len(plan.steps)
    per_segment = steps_per_segment or steps
    return _Plan(
        *(tensor.data_ptr() for tensor in plan[:-2]), plan.records.shape[1], plan.slots, plan.windows, steps,
        per_segment, -(-steps // per_segment),
    )  # fmt: skip


def _strided(tensor: Tensor) -> _Strided:
    batch, token, head = tensor.stride()[:3]
    return _Strided(tensor.data_ptr(), batch, head, token * tensor.element_size())


def few_bytes(kernel: str, dim: int) -> int:
    """Shared memory that a block of a kernel for few rows asks for; `kernel` is "forward" or "backward"."""
    return int(_harness().library.attention_few_bytes(dim, kernel == "backward"))


def _forward_scale(scale: float) -> float:
    function = _harness().library.attention_forward_scale
    function.restype, function.argtypes = ctypes.c_float, [ctypes.c_double]
    return function(scale)


def _dropout(dropout_p: float, seed: Tensor | None) -> _Dropout:
    pointer = seed.data_ptr() if seed is not None and dropout_p > 0 else None
    return _Dropout(pointer, dropout.threshold(dropout_p), 1 / (1 - dropout_p))


def _resident_shape(topology: TokenTopology, kernel: str, windows: int | None) -> Shape:
    shape = resident_shape(topology.num_vertices, topology.num_hubs, kernel == "backward")
    assert shape is not None
    return shape if windows is None else shape._replace(windows=windows)


class EmulatedAttention:
    """Forward and backward of one call.

    Args:
        topology: the pattern.
        steps_per_segment: 0 lets one block walk over the whole mesh.
        clusters: whether segments (at most eight) combine their hub rows as a cluster; else a kernel does.
        narrow: whether blocks of 64 bytes of heads walk over the whole mesh alone; head dims up to 32.
        windows: of a step of a narrow block; by default so many as `resident_shape` says.
        options: of ``Harness.run``: schedule, races, seed.
    """

    def __init__(
        self,
        topology: TokenTopology,
        steps_per_segment: int = 0,
        clusters: bool = False,
        narrow: bool = False,
        windows: int | None = None,
        **options: Any,
    ) -> None:
        shapes = {"forward": FORWARD, "forward_narrow": FORWARD_NARROW, "backward": BACKWARD}
        if narrow:
            shapes = {kernel: _resident_shape(topology, kernel, windows) for kernel in ("forward", "backward")}
            shapes["forward_narrow"] = shapes["forward"]
        self.packed: dict[str, PackedPlan] = {}
        for name, shape in shapes.items():
            plan = topology.make_plan(shape)
            if plan is None:
                raise ValueError("the topology has no plan")
            self.packed[name] = pack(plan, name == "backward")
        self.topology, self.clusters, self.narrow, self.options = topology, clusters, narrow, options
        self.plans = {name: _plan(plan, steps_per_segment) for name, plan in self.packed.items()}
        self.statistics: list[build.Statistics] = []

    def _sizes(self, q: Tensor) -> _Sizes:
        batch, tokens, heads, dim = q.shape
        return _Sizes(batch, tokens, heads, dim, self.topology.num_hubs)

    def _run(
        self,
        function: str,
        plan_name: str,
        arguments: ctypes.Structure,
        reads: Sequence[Tensor | None],
        writes: Sequence[Tensor],
    ) -> None:
        plan = self.packed[plan_name][:-2]
        inputs = [*plan, *(tensor for tensor in reads if tensor is not None)]
        statistics = _harness().run(
            function,
            arguments,
            int(writes[0].dtype == torch.bfloat16) + 2 * self.narrow,
            reads={f"read{i}": tensor for i, tensor in enumerate(inputs) if tensor.numel()},
            writes={f"write{i}": tensor for i, tensor in enumerate(writes) if tensor.numel()},
            **self.options,
        )
        self.statistics.append(statistics)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float = 0.0, seed: Tensor | None = None,
        few: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Output and log-sum-exp; `few`: by the kernel for few rows."""
        batch, tokens, heads, dim = q.shape
        out = torch.full((batch, tokens, heads, dim), math.nan, dtype=q.dtype)
        lse = torch.full((batch, heads, tokens), math.nan)
        which = "forward" if dim > 32 else "forward_narrow"
        plan = self.plans[which]
        partials = self._partials(which, 0 if few else batch * heads * plan.segments, dim)
        arguments = _Forward(
            plan, self._sizes(q), _strided(q), (_Strided * 2)(_strided(k), _strided(v)), out.data_ptr(),
            lse.data_ptr(), partials.data_ptr() if partials.numel() else None, _forward_scale(scale),
            0x80008000 if scale < 0 else 0, _dropout(dropout_p, seed),
        )  # fmt: skip
        if few:
            self._run_few("attention_forward_few", _FewForward, arguments, [q, k, v, seed], [out, lse])
        else:
            self._run("attention_forward", which, arguments, [q, k, v, seed], [out, lse, partials])
        return out, lse

    def _run_few(
        self, name: str, kind: type[ctypes.Structure], arguments: ctypes.Structure, reads: Sequence[Tensor | None],
        writes: Sequence[Tensor],
    ) -> None:  # fmt: skip
        """A kernel for few rows; the first tensor read tells the type."""
        pairs = build_few(self.topology.schedule, self.topology.num_hubs)
        if pairs is None:
            raise ValueError("a window has more than 64 keys")
        inputs = [tensor for tensor in (*reads, pairs) if tensor is not None]
        statistics = _harness().run(
            name,
            kind(arguments, pairs.data_ptr(), len(pairs)),
            int(inputs[0].dtype == torch.bfloat16),
            reads={f"read{i}": tensor for i, tensor in enumerate(inputs)},
            writes={f"write{i}": tensor for i, tensor in enumerate(writes)},
            **self.options,
        )
        self.statistics.append(statistics)

    def _partials(self, which: str, parts: int, dim: int) -> Tensor:
        """Where segments leave their sums of hub rows; empty where there is one segment, or a cluster of them."""
        hubs = self.topology.num_hubs if self.plans[which].segments > 1 and not self.clusters else 0
        return torch.full((parts, hubs, _padded_dim(dim) + 4), math.nan)

    def backward(
        self, grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        scale: float, dropout_p: float = 0.0, seed: Tensor | None = None, few: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of q, k, v; `few`: by the kernel for few rows."""
        batch, tokens, heads, dim = q.shape
        grads = [torch.full((batch, tokens, heads, dim), math.nan, dtype=q.dtype) for _ in range(3)]
        plan = self.plans["backward"]
        partials = self._partials("backward", 0 if few else 3 * batch * heads * plan.segments, dim)
        symmetric = plan.record_bytes == 368
        arguments = _Backward(
            plan, self._sizes(q), (_Strided * 5)(*map(_strided, (k, v, q, grad, out))), lse.data_ptr(),
            grad_lse.data_ptr() if grad_lse is not None else None,
            (ctypes.c_void_p * 3)(*(g.data_ptr() for g in grads)), partials.data_ptr() if partials.numel() else None,
            scale, scale * math.log2(math.e), *((0, 320) if symmetric else (368, 624)), _dropout(dropout_p, seed),
        )  # fmt: skip
        reads = [grad, grad_lse, q, k, v, out, lse, seed]
        if few:
            self._run_few("attention_backward_few", _FewBackward, arguments, reads, grads)
        else:
            self._run("attention_backward", "backward", arguments, reads, [*grads, partials])
        return grads[0], grads[1], grads[2]
