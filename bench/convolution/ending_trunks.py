"""What the kernel for ends of blocks brings to a whole trunk.

    python -m bench.convolution.ending_trunks [--trunk resnet50 hrnet-w64] [--batch 1 8 32 256] [--side 224]
                                              [--rounds 15] [--device cuda]

The engine's trunk with the kernel's table and with an empty one, each one CUDA graph, timed in turn after both were
held against the plain trunk in float32. Microseconds of the median; fails where either is off by more than the limit.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from unittest import mock

import torch
from torch import Tensor

from bench.convolution.layers import TRUNKS
from bench.convolution.measure import Timer, take_in_turn
from bench.convolution.trunks import LARGEST_ERROR, make_trunk, trunk_error, truth_of
from fastmetro.inference.engine.backbones import fold_backbone
from fastmetro.inference.engine.folded_backbone import FoldedBackbone
from fastmetro_kernels.convolution.ending_configs import MEASURED

FEW, MANY_ERROR = 16, 1.1e-3
"""Images up to which the limit is `LARGEST_ERROR`; with HRNet of 32 and 256 cuDNN is off by 1.02e-3 in float16, too."""


def without_endings(folded: FoldedBackbone, x: Tensor) -> Tensor:
    """The trunk as the engine runs it where the kernel's table is empty."""
    with mock.patch.dict(MEASURED, clear=True):
        return folded(x)


@torch.no_grad()
def compare(trunk: str, images: int, side: int, device: torch.device, rounds: int) -> tuple[list[float], list[float]]:
    """Microseconds and relative L2 errors, with the kernel and without it."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    backbone, pixels = make_trunk(trunk, images, side, device)
    truth, x = truth_of(backbone, pixels), pixels.to(dtype, memory_format=torch.channels_last)
    folded = fold_backbone(backbone, dtype)
    calls = [functools.partial(folded, x), functools.partial(without_endings, folded, x)]
    errors = [trunk_error(call(), truth) for call in calls]
    timers = [Timer([call], device) for call in calls]
    take_in_turn(timers, rounds)
    return [timer.median for timer in timers], errors


def main(arguments: Sequence[str] | None = None) -> None:
    """A line for each trunk and number of images."""
    parser = argparse.ArgumentParser(
        "python -m bench.convolution.ending_trunks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--trunk", nargs="+", choices=TRUNKS, default=list(TRUNKS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 256])
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    torch.backends.cudnn.benchmark = True
    wrong = 0
    for trunk in options.trunk:
        for images in options.batch:
            times, errors = compare(trunk, images, options.side, torch.device(options.device), options.rounds)
            limit = LARGEST_ERROR if images <= FEW else MANY_ERROR
            wrong += not all(error <= limit for error in errors)
            print(f"{trunk} {images}: with {times[0]:.1f} us, without {times[1]:.1f}, "
                  f"errors {errors[0]:.1e} and {errors[1]:.1e}", flush=True)  # fmt: skip
    if wrong:
        raise SystemExit(
            f"{wrong} trunks are off by more than {LARGEST_ERROR:g} (more than {FEW} images: {MANY_ERROR:g})"
        )


if __name__ == "__main__":
    main()
