"""Time of sparse_upsample against dense matmul, torch CSR, a loop over samples and the device's own limits.

    python -m bench upsampling --device cpu|cuda [--dtype float32] [--batch 1 32] [--channels 3] [--passes forward both]

The matrices are the published ones where ``--data`` (mesh_downsampling.npz of the published code) exists, else random
ones of the same sizes and row lengths. Every result is held against float64 before its time is printed; one that is
wrong stops the run. Prints a table and writes ``bench/results/upsampling_<device>.csv`` with the machine, versions,
command and commit in every line. ``call`` is the median wall time of one call, waited for; ``fastest`` the shortest of
them; ``graph`` (CUDA only) the time inside a captured graph, where the cost of launching from Python is gone.
"""

from __future__ import annotations

import argparse
import csv
import functools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from bench.common import ROOT, SHARED, environment
from fastmetro_kernels import BackendUnavailable, SparseMatrix, sparse_upsample

PUBLISHED = SHARED / "data" / "fastmetro" / "mesh_downsampling.npz"
OURS = ("native", "triton", "reference")
GRAPH_CALLS = 20
SLOW_MS = 2000.0  # a contender that has taken this long is not called further
COLUMNS = ("matrix", "batch", "channels", "dtype", "passes", "name", "error", "call", "fastest", "graph", "note")


def matrices(data: Path) -> Iterator[tuple[str, SparseMatrix]]:
    """The two steps of the body hierarchy and their product, by name."""
    if data.is_file():
        fine, coarse = np.load(data, allow_pickle=True, encoding="latin1")["U"]
        kind = "published"
    else:
        fine, coarse = random_step(6890, 1723), random_step(1723, 431)
        kind = "random"
    first, second = SparseMatrix.from_scipy(fine), SparseMatrix.from_scipy(coarse)
    yield f"{kind} 1723->6890", first
    yield f"{kind} 431->1723", second
    yield f"{kind} 431->6890", first @ second


def random_step(rows: int, columns: int) -> sp.csr_array:
    """Three neighbouring columns in each row, as the barycentric coordinates of a mesh step."""
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(3), rows).ravel()
    start = np.arange(rows)[:, None] * columns // rows
    column = (start + np.array([0, 1, columns // 9])) % columns
    return sp.csr_array((weights, (np.repeat(np.arange(rows), 3), column.ravel())), shape=(rows, columns))


def contenders(matrix: SparseMatrix, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    """Plain PyTorch's ways to the product, and this project's."""
    dense = matrix.to_dense(dtype)
    scipy_coo = matrix.to_scipy().tocoo()
    indices = torch.from_numpy(np.stack([scipy_coo.row, scipy_coo.col])).to(device)
    values = torch.from_numpy(scipy_coo.data).to(device, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CSR support is called beta, and invariants are not checked by default
        coo = torch.sparse_coo_tensor(indices, values, matrix.shape).coalesce()
        csr = coo.to_sparse_csr()

    def flat(product: Tensor, x: Tensor) -> Tensor:
        """``product @ x`` with the batch in the columns, which is faster than broadcasting the matrix."""
        columns = x.permute(1, 0, 2).reshape(x.shape[1], -1)
        return (product @ columns).view(-1, x.shape[0], x.shape[2]).permute(1, 0, 2).contiguous()

    found: dict[str, Callable[[Tensor], Tensor]] = {
        "dense": lambda x: dense @ x,
        "dense, batch in columns": functools.partial(flat, dense),
        "torch CSR": functools.partial(flat, csr),
        "loop over samples": lambda x: torch.stack([torch.sparse.mm(coo, sample) for sample in x]),
    }
    for backend in OURS:
        found[f"ours, {backend}"] = functools.partial(sparse_upsample, matrix=matrix, backend=backend)
    return found


def both_passes(product: Callable[[Tensor], Tensor], grad: Tensor) -> Callable[[Tensor], Tensor]:
    """Forward and backward; returns the gradient."""

    def run(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(product(x), x, grad)[0]

    return run


def call_times(run: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Milliseconds of single calls, each waited for."""
    times: list[float] = []
    for index in range(repeats + 3):
        if sum(times) > SLOW_MS and len(times) >= 5:
            break
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if index >= 3:
            times.append((time.perf_counter() - start) * 1e3)
    return times


def graph_time(run: Callable[[], object], repeats: int) -> float | None:
    """Milliseconds of one call inside a CUDA graph of several, or None where it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            kept = [run() for _ in range(GRAPH_CALLS)]
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / GRAPH_CALLS)
    del kept
    return statistics.median(times)


def measure(matrix: SparseMatrix, batch: int, options: argparse.Namespace, which: str) -> Iterator[dict[str, object]]:
    """One line per contender: its name, error and times. Raises SystemExit when a result of ours is wrong."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, matrix.shape[1], options.channels, generator=generator).to(device, dtype)
    grad = torch.randn(batch, matrix.shape[0], options.channels, generator=generator).to(device, dtype)
    exact = matrix.to_dense(torch.float64)
    oracle = exact @ x.double() if which == "forward" else exact.T @ grad.double()
    limit = 0.0
    for name, product in contenders(matrix, dtype, device).items():
        run = functools.partial(product if which == "forward" else both_passes(product, grad), x)
        try:
            error = (run().double() - oracle).abs().max().item()
        except (BackendUnavailable, RuntimeError, NotImplementedError) as problem:
            nothing = dict.fromkeys(("error", "call", "fastest", "graph"))
            yield {"name": name, **nothing, "note": str(problem).splitlines()[0]}
            continue
        if name == "dense":
            limit = 2 * error + torch.finfo(dtype).eps * oracle.abs().max().item()
        if error > limit and name.startswith("ours"):
            raise SystemExit(f"{name} is wrong: error {error:.3g}, allowed {limit:.3g}; no times are printed for it")
        times = call_times(run, device, options.repeats)
        graph = graph_time(run, options.repeats) if device.type == "cuda" else None
        line = {"name": name, "error": error, "call": statistics.median(times), "fastest": min(times), "graph": graph}
        yield {**line, "note": "" if error <= limit else f"error above the {limit:.2g} allowed to ours"}


def cell(milliseconds: object) -> str:
    """A time in the table, or a dash."""
    return f"{milliseconds:9.4f}" if isinstance(milliseconds, float) else f"{'-':>9}"


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table per case, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16", "float64"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--passes", nargs="+", default=["forward", "both"], choices=["forward", "both"])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--data", type=Path, default=PUBLISHED)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    options = parser.parse_args(arguments)

    lines = []
    common = environment(torch.device(options.device))
    print(f"{common['device']}, torch {common['torch']}, commit {common['commit']}, {options.dtype}, "
          f"{options.channels} channels; milliseconds")
    for matrix_name, matrix in matrices(options.data):
        for which in options.passes:
            for batch in options.batch:
                title = f"{matrix_name}, batch {batch}, {'forward' if which == 'forward' else 'forward and backward'}"
                print(f"\n{title:28}{'call':>9} {'fastest':>9} {'graph':>9}")
                case = {"matrix": matrix_name, "batch": batch, "channels": options.channels, "dtype": options.dtype}
                for line in measure(matrix.to(options.device), batch, options, which):
                    times = [cell(line[key]) for key in ("call", "fastest", "graph")]
                    print(f"  {line['name']:26}", *times, line["note"])
                    lines.append({**case, "passes": which, **line, **common})
    options.out.mkdir(parents=True, exist_ok=True)
    target = options.out / f"upsampling_{options.device.replace(':', '')}.csv"
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *common])
        writer.writeheader()
        writer.writerows(lines)
    print(f"\nwritten to {target}")


if __name__ == "__main__":
    main()
