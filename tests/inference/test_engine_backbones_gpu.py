"""What only a GPU can show of the folded backbones: half precision by cuDNN, graphs, memory that must not be read."""

from __future__ import annotations

import copy
from typing import cast

import pytest
import torch
from backbone_cases import TRUNKS, all_trunks, error, exact, images, randomize, rounding
from torch import Tensor, nn

from bench.convolution.trunks import make_trunk
from fastmetro.inference.engine.backbones import FoldedBackbone, fold_backbone
from fastmetro.inference.engine.convolution import convolution
from fastmetro.inference.engine.weights import ConvolutionWeights
from fastmetro.models.backbones import HRNetW64, ResNet50
from fastmetro.profiling.latency import tensor_float_32

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
with_kernel = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", TRUNKS)
def test_half_precision(kind: type[nn.Module], dtype: torch.dtype) -> None:
    backbone = all_trunks()[kind]
    for x in (images(1, 64), images(3, 224)):
        truth = exact(copy.deepcopy(backbone).cuda(), x.cuda()).cpu()
        with torch.no_grad():
            plain = copy.deepcopy(backbone).cuda().to(dtype)(x.cuda().to(dtype))
        assert rounding(fold_backbone(copy.deepcopy(backbone).cuda(), dtype)(x.cuda()), truth) < 2 * rounding(
            plain, truth
        )


@pytest.mark.parametrize("kind", [ResNet50, HRNetW64])
def test_float32(kind: type[nn.Module]) -> None:
    backbone, x = copy.deepcopy(all_trunks()[kind]).cuda(), images(2, 64).cuda()
    truth = exact(backbone, x).cpu()
    with torch.no_grad():
        assert rounding(fold_backbone(backbone, torch.float32)(x), truth) < 2 * rounding(backbone(x), truth)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["auto", "library"])
def test_convolutions_read_nothing_stale(dtype: torch.dtype, backend: str) -> None:
    """cuDNN's fused operator gets the output's memory as a term with factor 0: NaN there must not matter."""
    layer = randomize(nn.Conv2d(64, 64, 3, padding=1)).cuda()
    weights = ConvolutionWeights(layer, dtype)
    weights.load(layer.weight.detach(), cast(Tensor, layer.bias).detach())
    weights.backend = backend
    x = torch.randn(2, 64, 14, 14, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
    with torch.no_grad():
        clean = convolution(x, weights, relu=True)
        for _ in range(10):
            poison = [torch.full_like(clean, float("nan")) for _ in range(8)]
            del poison
            assert torch.equal(convolution(x, weights, relu=True), clean)


def captured(folded: FoldedBackbone, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        folded(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = folded(x)
    return graph, result


@pytest.mark.parametrize("kind", [ResNet50, HRNetW64])
def test_graphs_of_two_sizes(kind: type[nn.Module]) -> None:
    """Replays on new images, new weights and in turn: what branches on parallel streams write is never mixed up."""
    folded = fold_backbone(copy.deepcopy(all_trunks()[kind]).cuda(), torch.float16)
    side = 64 if kind is HRNetW64 else 224
    inputs = [images(batch, side).cuda().half().to(memory_format=torch.channels_last) for batch in (1, 3)]
    graphs = [captured(folded, x) for x in inputs]
    check_replays(folded, inputs, graphs)
    torch.manual_seed(2)
    folded.refresh(randomize(kind(), seed=2).cuda())
    for x in inputs:
        x.copy_(x.flip(-1))
    check_replays(folded, inputs, graphs)


def check_replays(
    folded: FoldedBackbone, inputs: list[Tensor], graphs: list[tuple[torch.cuda.CUDAGraph, Tensor]]
) -> None:
    """Twenty replays of every graph have the same bits, those of the eager call but for another choice of kernels."""
    for x, (graph, result) in zip(inputs, graphs, strict=True):
        eager = folded(x).cpu().double()
        graph.replay()
        first = result.clone()
        assert error(first, eager) < 1e-2
        for _ in range(20):
            result.fill_(float("nan"))
            graph.replay()
            assert torch.equal(result, first)


@with_kernel
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("convolutions", ["auto", "native"])
@pytest.mark.parametrize("name", ["resnet50", "hrnet-w64"])
def test_whole_trunks_on_the_convolution_kernel(name: str, convolutions: str, batch: int) -> None:
    """As near to the float32 trunk as cuDNN, in a graph as well as outside; the same bits in every replay."""
    backbone, pixels = make_trunk(name, batch, 224, torch.device("cuda"))
    with torch.no_grad(), tensor_float_32(False):
        truth = backbone(pixels).double()
    x = pixels.half().to(memory_format=torch.channels_last)
    library = fold_backbone(backbone, torch.float16, "library")(x).double()
    limit = 1.1 * float((library - truth).norm() / truth.norm())
    folded = fold_backbone(backbone, torch.float16, convolutions)
    graph, result = captured(folded, x)
    graph.replay()
    first = result.clone()
    for got in (folded(x), first):
        assert float((got.double() - truth).norm() / truth.norm()) <= limit
    for _ in range(100):
        result.fill_(float("nan"))
        graph.replay()
        assert torch.equal(result, first)


@with_kernel
def test_captured_kernels_see_new_weights() -> None:
    folded = fold_backbone(copy.deepcopy(all_trunks()[ResNet50]).cuda(), torch.float16, "native")
    x = images(1, 224).cuda().half().to(memory_format=torch.channels_last)
    graph, result = captured(folded, x)
    other = randomize(copy.deepcopy(all_trunks()[ResNet50]), seed=2).cuda()
    folded.refresh(other)
    graph.replay()
    fresh = fold_backbone(other, torch.float16, "native")
    assert torch.equal(result, fresh(x))
    assert error(result, fold_backbone(other, torch.float16, "library")(x).cpu().double()) < 1e-2
