"""Which backend takes a call, in each pass, and why: by name, by measurement, or by a fixed order."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from fastmetro_kernels import backends
from fastmetro_kernels.attention import native, reference
from fastmetro_kernels.attention.configs import PASSES
from fastmetro_kernels.topology import TokenTopology
from fastmetro_kernels.tuning import choice, table

BACKENDS = ("native", "triton", "reference")

ORDER_CUDA = ("native", "triton", "reference")
"""What `"auto"` tries on a GPU whose family has no table of measurements. On an H200 the CUDA kernels won every case of
the benchmark or came within 2 % (`bench/results/attention_h200.csv`)."""

ORDER_OTHER = ("native", "reference")
"""The same elsewhere; interpreted Triton runs by name only."""


class Choice(NamedTuple):
    """The backend of one pass, and its configuration as a plain value (None: the backend's own)."""

    backend: str
    configuration: Any = None


class Explanation(NamedTuple):
    """Why one pass runs where it runs: backend, configuration in words, and the reason."""

    backend: str
    configuration: str
    reason: str


def module(name: str) -> ModuleType:
    """The backend module of that name; Triton is imported when it is first used."""
    if name == "native":
        return native
    if name == "reference":
        return reference
    from fastmetro_kernels.attention import triton

    return triton


def run(chosen: Choice, pass_name: str, *arguments: Any) -> Any:
    """`forward` or `backward` of the chosen backend."""
    function = getattr(module(chosen.backend), pass_name)
    if chosen.configuration is None:
        return function(*arguments)
    if chosen.backend == "triton":
        return function(*arguments, choice.triton_config(chosen.configuration))
    return function(*arguments, chosen.configuration)


def _reasons(name: str, q: Tensor, k: Tensor, v: Tensor, topology: TokenTopology) -> list[str]:
    if name == "triton":  # without Triton its module cannot be imported
        return backends.triton_reasons(q.device) or module(name).reasons(q, k, v, topology)
    return module(name).reasons(q, k, v, topology)


def backend_reasons(q: Tensor, k: Tensor, v: Tensor, topology: TokenTopology) -> dict[str, list[str]]:
    """For every backend the reasons why it cannot take this input; an empty list means that it can."""
    return {name: _reasons(name, q, k, v, topology) for name in BACKENDS}


def _order(q: Tensor) -> tuple[str, ...]:
    return ORDER_CUDA if q.device.type == "cuda" else ORDER_OTHER


def _measured(pass_name: str, q: Tensor, topology: TokenTopology) -> tuple[tuple[str, Any], ...]:
    batch_heads = q.shape[0] * q.shape[2]
    return choice.ranking(q.device, pass_name, q.dtype.itemsize, q.shape[3], topology.num_vertices, batch_heads)


def _by_order(requested: str, q: Tensor, k: Tensor, v: Tensor, topology: TokenTopology) -> str:
    """The first backend that can; asks no backend that does not come into question."""
    order = _order(q)
    for name in order if requested == "auto" else (requested,):
        if name in BACKENDS and not _reasons(name, q, k, v, topology):
            return name
    return backends.select("topology_attention", requested, backend_reasons(q, k, v, topology), order)


def choose(requested: str, q: Tensor, k: Tensor, v: Tensor, topology: TokenTopology) -> tuple[Choice, Choice]:
    """Backends and configurations of the forward and the backward pass.

    `"auto"` takes the fastest measured backend that can take the input, pass by pass. A named backend runs both passes,
    with its fastest measured configuration. Without a measurement the order (`ORDER_CUDA`, `ORDER_OTHER`) decides, and
    configurations are those that the backend pins.

    Raises:
        ValueError, BackendUnavailable: see `backends.select`.
    """
    name = _by_order(requested, q, k, v, topology)
    if name == "reference":
        return Choice(name), Choice(name)
    can: dict[str, bool] = {name: True}
    found = []
    for pass_name in PASSES:
        taken = Choice(name)
        for backend, configuration in _measured(pass_name, q, topology):
            if requested not in ("auto", backend):
                continue
            if backend not in can:
                can[backend] = not _reasons(backend, q, k, v, topology)
            if can[backend]:
                taken = Choice(backend, configuration)
                break
        found.append(taken)
    return found[0], found[1]


def explain(q: Tensor, k: Tensor, v: Tensor, topology: TokenTopology, backend: str = "auto") -> dict[str, Explanation]:
    """Which backend `topology_attention` takes for these tensors, and why. Nothing is run.

    Args:
        q, k, v, topology, backend: As in `topology_attention`; dtypes after autocast.

    Returns:
        For `"forward"` and `"backward"` the backend, its configuration in words and the reason.

    Raises:
        ValueError: an unknown backend.
        BackendUnavailable: no backend, or not the named one, can take this input.
    """
    chosen = choose(backend, q, k, v, topology)
    return {
        pass_name: _explanation(pass_name, one, backend, q, k, v, topology)
        for pass_name, one in zip(PASSES, chosen, strict=True)
    }


def _explanation(
    pass_name: str, chosen: Choice, requested: str, q: Tensor, k: Tensor, v: Tensor, topology: TokenTopology
) -> Explanation:
    by_name = "" if requested == "auto" else f"{requested} was asked for by name; "
    if chosen.configuration is None:
        refused = [
            f"{name} cannot: {'; '.join(why)}" for name, why in backend_reasons(q, k, v, topology).items() if why
        ]
        order = f"the order is {', '.join(_order(q))}"
        return Explanation(
            chosen.backend,
            "its own",
            by_name + "; ".join([f"no measurement of this device family and head dim: {order}", *refused]),
        )
    configuration = chosen.configuration
    if chosen.backend == "triton":
        configuration = choice.triton_config(configuration)
    family = choice.family_of(q.device)
    assert family is not None  # a configuration comes from its table
    points = choice.nearest(family, pass_name, q.dtype.itemsize, q.shape[3], topology.num_vertices)
    point = min(points, key=lambda one: _distance(one.batch_heads, q.shape[0] * q.shape[2]))
    times = ", ".join(f"{one} {one.milliseconds:.4f} ms" for one in runners_up(point))
    where = f"{point.vertices} vertices, head dim {point.dim}, batch * heads {point.batch_heads}, {point.dtype}"
    return Explanation(chosen.backend, table.describe(configuration), f"{by_name}measured at {where}: {times}")


def _distance(measured: int, wanted: int) -> float:
    return max(measured, wanted) / max(min(measured, wanted), 1)


def runners_up(point: table.Point) -> list[table.Candidate]:
    """The fastest candidate of each backend, fastest first."""
    best: dict[str, table.Candidate] = {}
    for one in point.candidates:
        best.setdefault(one.backend, one)
    return list(best.values())
