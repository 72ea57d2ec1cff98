"""First runs of ResNet-50's trunk behind the stem on convolution_native: the chain in one CUDA graph, beside cuDNN's.

    python -m bench.convolution_trunk_try [BATCH]

Each distinct layer is tuned alone first; then the chain runs with the tiles that won. (To become bench/convolution.)
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch

from bench.common import capture
from fastmetro.inference.engine.backbones import fold_backbone
from fastmetro.inference.engine.convolution import residual_block
from fastmetro.models.backbones import create_backbone
from fastmetro.profiling.contenders import settle_batch_norms
from fastmetro_kernels import backends
from fastmetro_kernels.convolution import ConvolutionConfig, convolution, lay_out
from fastmetro_kernels.convolution.api import _check
from fastmetro_kernels.convolution.configs import usable

Layer = tuple[Any, bool, bool]
"""Weights, whether the block's input is added, whether it is the second input."""


def laid_out(block: Any) -> list[Layer]:
    layers: list[Layer] = []
    for place, mine in enumerate(block.convolutions):
        last = place == len(block.convolutions) - 1
        second = None
        if last and block.downsample is not None:
            zero = torch.zeros_like(mine.bias)
            second = (block.downsample.weight, zero, block.downsample.stride[0])
        weights = lay_out(mine.weight, mine.bias, mine.stride[0], mine.padding[0], second)
        layers.append((weights, last and second is None, second is not None))
    return layers


def microseconds(run: Any, calls: int = 1) -> float:
    run()
    graph = capture([run] * calls, keep=1)
    graph.graph.replay()
    return min(graph.milliseconds() for _ in range(15)) * 1e3


def tuned(x: Any, layer: Layer, block_input: Any, known: dict[Any, ConvolutionConfig]) -> ConvolutionConfig:
    weights, adds, joins = layer
    residual, second = (block_input if adds else None), (block_input if joins else None)
    shape = _check(x, weights, residual, second)
    key = (shape, tuple(weights.weight.shape), weights.stride, adds, joins)
    if key not in known:
        times = []
        for config in usable(shape):
            run = functools.partial(
                convolution, x, weights, residual=residual, second=second, config=config, backend="native"
            )
            times.append((microseconds(run, 10), config))
        times.sort()
        known[key] = times[0][1]
        print(f"  {tuple(shape)} {list(weights.weight.shape)}: {times[0][0]:.2f} {tuple(times[0][1])}", flush=True)
    return known[key]


@torch.no_grad()
def main() -> None:
    backends.load_native()
    batch = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    torch.manual_seed(0)
    backbone = create_backbone("resnet50").cuda().eval()
    settle_batch_norms(backbone)
    folded = fold_backbone(backbone, torch.float16)
    blocks: Any = folded.blocks
    start = torch.randn(batch, 64, 56, 56, device="cuda").half().relu().contiguous(memory_format=torch.channels_last)

    def library() -> Any:
        x = start
        for block in blocks:
            x = residual_block(x, block)
        return x

    layers = [laid_out(block) for block in blocks]
    known: dict[Any, ConvolutionConfig] = {}
    plan: list[list[tuple[Layer, ConvolutionConfig]]] = []
    x = start
    for parts in layers:
        block_input, chosen = x, []
        for layer in parts:
            config = tuned(x, layer, block_input, known)
            chosen.append((layer, config))
            x = step(x, layer, block_input, config)
        plan.append(chosen)

    def ours() -> Any:
        x = start
        for parts in plan:
            block_input = x
            for layer, config in parts:
                x = step(x, layer, block_input, config)
        return x

    want, got = library().double(), ours().double()
    print(f"relative difference {float((got - want).norm() / want.norm()):.2e}")
    print(f"batch {batch}, behind the stem: cuDNN {microseconds(library):.1f} us, ours {microseconds(ours):.1f} us")


def step(x: Any, layer: Layer, block_input: Any, config: ConvolutionConfig) -> Any:
    weights, adds, joins = layer
    return convolution(
        x, weights, residual=block_input if adds else None, second=block_input if joins else None, config=config,
        backend="native",
    )  # fmt: skip


if __name__ == "__main__":
    main()
