"""Folded backbones against the plain ones, in turn: eager on a CPU, as CUDA graphs on a GPU.

    python -m bench backbones [--names resnet50 hrnet-w64] [--batch 1 32] [--dtype float32] [--repeats 30] [--csv FILE]

The plain backbone is timed as it is and in channels_last, on a GPU with cuDNN's benchmark mode for both; HRNet on a GPU
also folded on one stream. Before a time is printed, the outputs are compared with each other.
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.common import alternate, capture, environment, versions, write_csv
from fastmetro.inference.engine.backbones import fold_backbone
from fastmetro.inference.engine.folded_hrnet import FoldedHRNet
from fastmetro.inference.engine.streams import ParallelStreams
from fastmetro.models.backbones import BACKBONES, create_backbone

TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 3e-1}
"""Largest difference from the plain float32 features, relative to the largest feature: what shows a mistake."""


class OneStream(ParallelStreams):
    """The pieces one after the other, also in a graph."""

    def run(self, device: torch.device, pieces: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """See :class:`ParallelStreams`."""
        return [piece() for piece in pieces]


def contenders(backbone: nn.Module, images: Tensor, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Calls that compute the features of ``images``, the folded backbone first."""
    x, last = images.to(dtype), images.to(dtype, memory_format=torch.channels_last)
    folded = fold_backbone(backbone, dtype)
    calls: dict[str, Callable[[], Tensor]] = {"folded": functools.partial(folded, last)}
    if isinstance(folded, FoldedHRNet) and images.is_cuda:
        one = copy.deepcopy(folded)
        one.streams = OneStream()
        calls["folded, one stream"] = functools.partial(one, last)
    plain = copy.deepcopy(backbone).to(dtype)
    calls["plain"] = functools.partial(plain, x)
    plain_last = copy.deepcopy(plain).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    calls["plain, channels_last"] = functools.partial(plain_last, last)
    return calls


def compare(name: str, batch: int, device: torch.device, dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    """One row per contender: the folded backbone's time beside its, and their ratio.

    Raises:
        RuntimeError: a contender's features differ from those of the plain float32 backbone.
    """
    torch.manual_seed(0)
    backbone = create_backbone(name).to(device).eval()
    for module in backbone.modules():  # blocks start as their shortcuts; here they must count
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 0.5)
    images = torch.randn(batch, 3, 224, 224, device=device)
    calls = contenders(backbone, images, dtype)
    truth = backbone(images)
    rows = []
    for title, call in calls.items():
        off = float((call().float() - truth).abs().max() / truth.abs().max())
        if not off < TOLERANCE[dtype]:
            raise RuntimeError(f"{name}, {title}: features differ by {off:.2e}, more than {TOLERANCE[dtype]:.0e}")
    runs = {title: capture([call]).graph.replay for title, call in calls.items()} if device.type == "cuda" else calls
    for title in list(runs)[1:]:
        timed = alternate(runs["folded"], runs[title], device, repeats)
        rows.append(
            {
                "backbone": name,
                "batch": batch,
                "dtype": str(dtype).removeprefix("torch."),
                "contender": title,
                "folded_ms": round(timed.first_ms, 4),
                "contender_ms": round(timed.second_ms, 4),
                "folded_fastest_ms": round(timed.first_fastest_ms, 4),
                "contender_fastest_ms": round(timed.second_fastest_ms, 4),
                "ratio": round(timed.ratio, 3),
                "fastest_ratio": round(timed.fastest_ratio, 3),
            }
        )
    return rows


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", choices=sorted(BACKBONES), default=["resnet50", "hrnet-w64"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 32, 256] if cuda else [1])
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float16" if cuda else "float32")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.backends.cudnn.benchmark = True
    rows: list[dict[str, Any]] = []
    for name in options.names:
        for batch in options.batch:
            for row in compare(name, batch, device, getattr(torch, options.dtype), options.repeats):
                print("{backbone:10} batch {batch:<4} folded {folded_ms:9.3f} ms   ".format(**row), end="")
                print("{contender:22} {contender_ms:9.3f} ms   ratio {ratio:.2f}".format(**row), end="")
                print("   (fastest: {fastest_ratio:.2f})".format(**row), flush=True)
                rows.append(row)
    if options.csv is not None:
        record = {**environment(device), **versions()}
        write_csv(options.csv, [{**row, **record} for row in rows])


if __name__ == "__main__":
    main()
