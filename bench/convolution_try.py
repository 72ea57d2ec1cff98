"""First runs of convolution_native on a GPU: right, and how fast? (To become bench/convolution.)

    python -m bench.convolution_try [BATCH] [quick]
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch
import torch.nn.functional as F

from bench.common import capture
from fastmetro_kernels import backends
from fastmetro_kernels.convolution import ops


def layers() -> list[tuple[int, int, int, int, int, int]]:
    """(size, channels in, out, kernel, stride, how many) of ResNet-50 behind the stem, without downsampling."""
    found: list[tuple[int, int, int, int, int, int]] = []
    channels, size = 64, 56
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        found.append((size, channels, width, 1, 1, 1))
        found.append((size, width, width, 3, stride, 1))
        size //= stride
        channels = 4 * width
        found.append((size, width, channels, 1, 1, blocks))
        found.append((size, channels, width, 1, 1, blocks - 1))
        found.append((size, width, width, 3, 1, blocks - 1))
    return found


def call(x: Any, w: Any, b: Any, r: Any, stride: int, padding: int, config: Any) -> Any:
    """x [N, H, W, C], w [K, R, S, C]."""
    return ops.convolution_native(x, w, b, r, None, None, stride, padding, 1, True, list(config))


def microseconds(run: Any, calls: int = 20) -> float:
    run()
    graph = capture([run] * calls, keep=2)
    graph.graph.replay()
    return min(graph.milliseconds() for _ in range(7)) * 1e3


def main() -> None:
    backends.load_native()
    batch = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    quick = "quick" in sys.argv
    torch.manual_seed(0)
    totals = [0.0, 0.0]
    for size, c, k, kernel, stride, count in layers():
        padding = kernel // 2
        x = torch.randn(batch, size, size, c, device="cuda").half()
        w = (torch.randn(k, kernel, kernel, c, device="cuda") / (c * kernel * kernel) ** 0.5).half()
        b = torch.randn(k, device="cuda")
        out = (size + 2 * padding - kernel) // stride + 1
        r = torch.randn(batch, out, out, k, device="cuda").half() if kernel == 1 and k > c else None
        cx, cw = x.permute(0, 3, 1, 2), w.permute(0, 3, 1, 2)
        exact = F.conv2d(cx.double(), cw.double(), b.double(), stride, padding)
        cr = None if r is None else r.permute(0, 3, 1, 2)
        exact = (exact if cr is None else exact + cr.double()).relu()
        half = b.half()

        def library(cx=cx, cw=cw, cr=cr, half=half, stride=stride, padding=padding) -> Any:
            s, p = (stride, stride), (padding, padding)
            if cr is None:
                return torch.cudnn_convolution_relu(cx, cw, half, s, p, (1, 1), 1)
            return torch.cudnn_convolution_add_relu(cx, cw, cr, 1.0, half, s, p, (1, 1), 1)

        def error(y: Any, exact: Any = exact) -> float:
            return float((y.double() - exact).norm() / exact.norm())

        theirs, their_error = microseconds(library), error(library())
        depth = kernel * kernel * -(-c // 64)
        results = []
        for columns, split, stages, early in itertools.product((32, 64, 128), (1, 2, 4, 8), (2, 4, 8, 16), (1, 0)):
            ring = stages * (64 + columns) * 128 + (64 * (columns + 8) * 4 if split > 1 else 0) + 2048
            if split > depth or columns > k or ring > 227 * 1024 or (stages > 2 and stages > 2 * -(-depth // split)):
                continue
            if quick and (early == 0 or stages not in (4, 8)):
                continue
            config = (columns, split, stages, early)
            try:
                y = call(x, w, b, r, stride, padding, config)
                found = error(y.permute(0, 3, 1, 2))
            except RuntimeError as problem:
                print("   ", config, str(problem)[:160])
                torch.cuda.synchronize()
                continue
            if not found < 2 * their_error + 1e-4:
                print("   ", config, f"error {found:.2e}, cuDNN {their_error:.2e}")
                continue
            results.append((microseconds(lambda cfg=config: call(x, w, b, r, stride, padding, cfg)), config, found))
        results.sort()
        best = results[0] if results else (float("inf"), None, 0.0)
        totals[0] += count * theirs
        totals[1] += count * best[0]
        print(f"{size:>3} {c:>4} -> {k:>4} {kernel}x{kernel}/{stride} x{count}  cuDNN {theirs:6.2f}  ours {best[0]:6.2f} "
              f"{best[1]} error {best[2]:.1e} ({their_error:.1e})  next {[(f'{t:.2f}', c) for t, c, _ in results[1:3]]}", flush=True)
    print(f"sum: cuDNN {totals[0]:.1f} us, ours {totals[1]:.1f} us")


if __name__ == "__main__":
    main()
