"""Folded backbones against the plain ones, whose own rounding error is the yardstick."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from backbone_cases import TRUNKS, all_trunks, error, exact, images, randomize, rounding
from torch import Tensor, nn

from fastmetro.inference.engine import onednn
from fastmetro.inference.engine.backbones import FoldedBackbone, UnknownBackbone, fold_backbone
from fastmetro.inference.engine.batch_norm import batch_norm_sizes, fold_batch_norm
from fastmetro.inference.engine.convolution import (
    basic_block,
    bottleneck,
    convolution,
    convolution_relu_add,
    double_stem,
    exchange_output,
    stem,
)
from fastmetro.inference.engine.weights import (
    BlockWeights,
    ConvolutionWeights,
    DoubleStemWeights,
    ExchangeWeights,
    StemWeights,
)
from fastmetro.models.backbones import CompactTrunk, HRNetW64, ResNet50, ResNet50Trunk
from fastmetro.models.backbones.blocks import BasicBlock, Bottleneck
from fastmetro.models.backbones.hrnet import ExchangeModule
from fastmetro_kernels.convolution import pack_double_stem, pack_stem

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trunks() -> dict[type[nn.Module], nn.Module]:
    """One float32 trunk of every type; never changed."""
    return all_trunks()


@pytest.fixture(scope="module")
def folded32(trunks: dict[type[nn.Module], nn.Module]) -> dict[type[nn.Module], FoldedBackbone]:
    """The trunks folded to float32; never changed."""
    return {kind: fold_backbone(trunk, torch.float32) for kind, trunk in trunks.items()}


# The folding steps


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_batch_norm_folds_into_a_convolution(biased: bool, affine: bool) -> None:
    layer, norm = nn.Conv2d(5, 7, 3, padding=1, bias=biased), nn.BatchNorm2d(7, affine=affine, eps=1e-2)
    if affine:
        randomize(norm)
    assert norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.1, 2)
    weight, bias = fold_batch_norm(layer, norm)
    assert weight.dtype == bias.dtype == torch.float64 and not weight.requires_grad
    x = torch.randn(2, 5, 6, 6, dtype=torch.float64)
    expected = exact(nn.Sequential(layer, norm).eval(), x)
    torch.testing.assert_close(F.conv2d(x, weight, bias, padding=1), expected, rtol=1e-12, atol=1e-12)


def test_what_is_no_batch_norm_is_refused() -> None:
    with pytest.raises(TypeError, match="norm must be a batch norm, got GroupNorm"):
        fold_batch_norm(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4))
    with pytest.raises(ValueError, match="running statistics"):
        fold_batch_norm(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(ValueError, match="1 group, no dilation"):
        ConvolutionWeights(nn.Conv2d(4, 4, 3, dilation=2), torch.float32)


@pytest.mark.parametrize(("kind", "run"), [(BasicBlock, basic_block), (Bottleneck, bottleneck)])
@pytest.mark.parametrize(("width", "stride"), [(24, 1), (24, 2), (None, 1)])
def test_residual_blocks(
    kind: type[BasicBlock] | type[Bottleneck], run: Callable[..., Tensor], width: int | None, stride: int
) -> None:
    width = width or 16 // kind.expansion  # without it the shortcut is the input
    block = randomize(kind(16, width, stride))
    weights = BlockWeights(block, torch.float64)
    weights.load(block)
    assert (weights.downsample is None) == (block.downsample is None)
    if weights.downsample is not None:
        assert weights.downsample.bias is None
    x = torch.randn(3, 16, 9, 7, dtype=torch.float64).to(memory_format=torch.channels_last)
    before = x.clone()
    with torch.no_grad():
        result = run(x, weights)
    assert error(result, exact(block, x)) < 1e-12
    assert torch.equal(x, before), "the input was written to"
    with pytest.raises(ValueError, match="weights must be those of a block of"), torch.no_grad():
        (bottleneck if run is basic_block else basic_block)(x, weights)


@pytest.mark.parametrize("branches", [2, 3, 4])
def test_exchange_outputs_have_one_bias(branches: int) -> None:
    module = randomize(ExchangeModule(branches))
    features = [torch.randn(2, 64 << i, 8 >> i, 16 >> i, dtype=torch.float64) for i in range(branches)]
    copies = [x.clone() for x in features]
    with torch.no_grad():
        plain = copy.deepcopy(module).double()
        plain.branches = nn.ModuleList(nn.Identity() for _ in range(branches))
        expected = plain([x.clone() for x in features])
        for target, paths in enumerate(cast("list[nn.ModuleList]", list(module.fuse_layers))):
            weights = ExchangeWeights(paths, torch.float64)
            weights.load(paths)
            ends = [path[-1].bias is not None for path in cast("list[nn.ModuleList]", list(weights.paths)) if len(path)]
            assert sum(ends) == 1
            assert error(exchange_output(features, weights), expected[target]) < 1e-12
    assert all(torch.equal(x, y) for x, y in zip(features, copies, strict=True)), "an input was written to"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_convolution(dtype: torch.dtype, relu: bool, added: bool) -> None:
    layer = nn.Conv2d(6, 10, 3, stride=2, padding=1)
    weights = ConvolutionWeights(layer, dtype)
    weights.load(layer.weight.detach(), layer.bias.detach() if layer.bias is not None else None)
    for shape in [(2, 6, 9, 8), (1, 6, 9, 8), (0, 6, 9, 8), (5, 6, 1, 1)]:
        x = torch.randn(shape, dtype=dtype).to(memory_format=torch.channels_last)
        with torch.no_grad():
            expected = copy.deepcopy(layer).double()(x.double())
            residual = torch.randn_like(expected) if added else None
            result = convolution(x, weights, relu, None if residual is None else residual.to(dtype))
        if residual is not None:
            expected += residual.to(dtype)
        torch.testing.assert_close(
            result.double(),
            expected.relu() if relu else expected,
            rtol=0,
            atol=1e-12 if dtype == torch.float64 else 1e-5,
        )


@pytest.mark.parametrize("backend", ["auto", "library", "reference"])
def test_a_sum_behind_the_relu(backend: str) -> None:
    layer = randomize(nn.Conv2d(16, 32, 3, stride=2, padding=1))
    weights = ConvolutionWeights(layer, torch.float64)
    weights.load(layer.weight.detach(), cast(Tensor, layer.bias).detach())
    weights.backend = backend
    x, residual = torch.randn(2, 16, 9, 8, dtype=torch.float64), torch.randn(2, 32, 5, 4, dtype=torch.float64)
    copies = x.clone(), residual.clone()
    with torch.no_grad():
        result = convolution_relu_add(x, weights, residual)
        assert error(result, layer.double()(x).relu() + residual) < 1e-12
    assert torch.equal(x, copies[0]) and torch.equal(residual, copies[1]), "an input was written to"


@pytest.mark.parametrize("kind", [CompactTrunk, ResNet50])
@pytest.mark.parametrize("backend", ["library", "reference"])
def test_stem(kind: type[CompactTrunk] | type[ResNet50], backend: str) -> None:
    convolution, norm, relu, pool, *_ = randomize(kind()).children()
    assert isinstance(convolution, nn.Conv2d)
    dtype = torch.float64 if backend == "library" else torch.float32  # the kernel's bias is float32
    weights = StemWeights(convolution, dtype)
    weights.backend = backend
    assert (weights.packed is not None) == (kind is ResNet50)
    weights.load(*fold_batch_norm(convolution, norm))
    x = torch.randn(2, 3, 33, 40, dtype=dtype)
    with torch.no_grad():
        expected = exact(nn.Sequential(convolution, norm, relu, pool), x)
        assert error(stem(x, weights), expected) < (1e-12 if backend == "library" else 1e-5)
        if weights.packed is not None:
            assert torch.equal(weights.packed, pack_stem(weights.weight))


@pytest.mark.parametrize("width", [64, 32])
@pytest.mark.parametrize("backend", ["library", "reference"])
def test_double_stem(width: int, backend: str) -> None:
    """Another width is no such stem, and is computed as two convolutions."""
    layers = [
        nn.Conv2d(3, width, 3, 2, 1),
        nn.BatchNorm2d(width),
        nn.Conv2d(width, width, 3, 2, 1),
        nn.BatchNorm2d(width),
    ]
    first, norm, second, other = randomize(nn.Sequential(*layers)).children()
    assert isinstance(first, nn.Conv2d) and isinstance(second, nn.Conv2d)
    dtype = torch.float64 if backend == "library" else torch.float32
    weights = DoubleStemWeights(first, second, dtype)
    weights.first.backend = weights.second.backend = backend
    assert (weights.laid_out() is not None) == (width == 64)
    weights.load(fold_batch_norm(first, norm), fold_batch_norm(second, other))
    x = torch.randn(2, 3, 33, 40, dtype=dtype)
    with torch.no_grad():
        expected = exact(nn.Sequential(first, norm, nn.ReLU(), second, other, nn.ReLU()), x)
        assert error(double_stem(x, weights), expected) < (1e-12 if backend == "library" else 1e-5)
        if weights.packed_second is not None:
            assert torch.equal(weights.packed_second, pack_double_stem(weights.first.weight, weights.second.weight)[1])


# Whole trunks


@pytest.mark.parametrize("kind", TRUNKS)
def test_float64_is_the_plain_network(kind: type[nn.Module], trunks: dict[type[nn.Module], nn.Module]) -> None:
    x = images(3, 64)
    folded = fold_backbone(trunks[kind], torch.float64)
    assert error(folded(x), exact(trunks[kind], x)) < 1e-10
    assert folded(x[:0]).shape == (0, folded.out_channels, 2, 2)


@pytest.mark.parametrize("kind", [ResNet50, CompactTrunk])
@pytest.mark.parametrize("size", [(1, 32, 32), (2, 33, 97), (5, 65, 50)])
def test_odd_sizes(kind: type[nn.Module], size: tuple[int, int, int], trunks: dict[type[nn.Module], nn.Module]) -> None:
    x = images(*size)
    assert error(fold_backbone(trunks[kind], torch.float64)(x), exact(trunks[kind], x)) < 1e-10


@pytest.mark.parametrize("kind", TRUNKS)
def test_float32_rounds_as_the_plain_network(
    kind: type[nn.Module],
    trunks: dict[type[nn.Module], nn.Module],
    folded32: dict[type[nn.Module], FoldedBackbone],
) -> None:
    # Weights are rounded once more, and the packed kernels may add up a sum in fewer parts than the plain ones.
    for batch in (1,) if kind is HRNetW64 else (1, 2, 1):  # with weights packed for either shape
        x = images(batch, 64)
        truth = exact(trunks[kind], x)
        with torch.inference_mode():
            assert rounding(folded32[kind](x), truth) < 2 * rounding(trunks[kind](x), truth)


@pytest.mark.parametrize("kind", TRUNKS)
def test_bfloat16_rounds_as_the_plain_network(kind: type[nn.Module], trunks: dict[type[nn.Module], nn.Module]) -> None:
    x = images(1, 32)
    truth = exact(trunks[kind], x)
    folded = fold_backbone(trunks[kind], torch.bfloat16)(x)
    with torch.no_grad():
        plain = copy.deepcopy(trunks[kind]).bfloat16()(x.bfloat16())
    assert folded.dtype == torch.bfloat16
    assert rounding(folded, truth) < 1.5 * rounding(plain, truth)


def test_height_and_width_of_hrnet_are_checked(folded32: dict[type[nn.Module], FoldedBackbone]) -> None:
    with pytest.raises(ValueError, match="multiples of 32, got 64 x 48"):
        folded32[HRNetW64](images(1, 64, 48))


def test_features_are_tokens_without_a_copy(folded32: dict[type[nn.Module], FoldedBackbone]) -> None:
    features = folded32[ResNet50](images(2, 64))
    assert features.flatten(2).transpose(1, 2).is_contiguous()
    assert not features.requires_grad


# New weights, copies, threads


@pytest.mark.parametrize("kind", [ResNet50Trunk, CompactTrunk, HRNetW64])
def test_refresh_takes_new_weights_in_place(kind: type[nn.Module], trunks: dict[type[nn.Module], nn.Module]) -> None:
    other, x = randomize(copy.deepcopy(trunks[kind]), seed=1), images(1, 32)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-0.9)
    folded = fold_backbone(trunks[kind], torch.float32)
    pointers = {name: tensor.data_ptr() for name, tensor in folded.state_dict().items()}
    before = folded(x)  # packs weights, which must be packed anew
    folded.refresh(other)
    fresh = fold_backbone(other, torch.float32)
    assert {name: tensor.data_ptr() for name, tensor in folded.state_dict().items()} == pointers
    assert not torch.equal(folded(x), before)
    assert torch.equal(folded(x), fresh(x))
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(folded.state_dict()[name], tensor), name


def test_refresh_wants_the_same_type(trunks: dict[type[nn.Module], nn.Module]) -> None:
    with pytest.raises(TypeError, match="backbone must be a ResNet50, as was folded, got CompactTrunk"):
        fold_backbone(trunks[ResNet50], torch.float32).refresh(trunks[CompactTrunk])


def test_folding_leaves_the_backbone_alone(trunks: dict[type[nn.Module], nn.Module]) -> None:
    backbone = copy.deepcopy(trunks[CompactTrunk]).train()
    state = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    folded = fold_backbone(backbone, torch.float32)
    folded(images(1, 32))
    assert backbone.training and all(p.requires_grad for p in backbone.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in backbone.state_dict().items())


def test_made_in_inference_mode_and_refreshed_outside(trunks: dict[type[nn.Module], nn.Module]) -> None:
    x = images(1, 32)
    with torch.inference_mode():
        folded = fold_backbone(trunks[CompactTrunk], torch.float32)
        first = folded(x)
    folded.refresh(trunks[CompactTrunk])
    assert torch.equal(folded(x), first)


def test_copies_and_pickles(trunks: dict[type[nn.Module], nn.Module]) -> None:
    folded, x = fold_backbone(trunks[CompactTrunk], torch.float32), images(1, 32)
    result = folded(x)
    for other in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        assert isinstance(other, FoldedBackbone) and other.folds == folded.folds
        assert torch.equal(other(x), result)


def test_packed_weights_follow_the_weight() -> None:
    packs = onednn.WeightPacks()
    weight = torch.randn(8, 8, 3, 3)

    def unpacked(shape: torch.Size) -> Tensor:
        return packs.get(weight, shape, (1, 1), (1, 1)).to_dense()

    if not onednn.usable(weight):
        pytest.skip("no oneDNN here")
    shapes = [torch.Size((batch, 8, 6, 6)) for batch in range(1, onednn.SHAPES_KEPT + 3)]
    assert all(torch.equal(unpacked(shape), weight) for shape in shapes)
    assert len(packs._packs) == onednn.SHAPES_KEPT
    assert packs.get(weight, shapes[-1], (1, 1), (1, 1)) is packs.get(weight, shapes[-1], (1, 1), (1, 1))
    weight.mul_(2)
    assert torch.equal(unpacked(shapes[-1]), weight)
    weight = weight + 1
    assert torch.equal(unpacked(shapes[-1]), weight)


def test_moved_to_another_type(trunks: dict[type[nn.Module], nn.Module]) -> None:
    folded, x = fold_backbone(trunks[CompactTrunk], torch.float32), images(1, 32)
    folded(x)
    with pytest.raises(RuntimeError):  # not silently in the old type with the old packed weights
        folded.double()(x)


# Backbones that the engine does not know


class Other(ResNet50):
    """A subclass may do anything."""

    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


@pytest.mark.parametrize("make", [Other, lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))])
def test_unknown_backbones_are_used_as_they_are(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    backbone, other, x = randomize(make()), randomize(make(), seed=1), images(1, 32)
    folded = fold_backbone(backbone, torch.float64)
    assert isinstance(folded, UnknownBackbone)
    assert folded.out_channels == 2048
    (fold,) = folded.folds
    assert fold.flops_saved == 0 and type(backbone).__name__ in fold.description
    assert torch.equal(folded(x), exact(backbone, x))
    assert next(backbone.parameters()).dtype == torch.float32
    pointers = [tensor.data_ptr() for tensor in folded.state_dict().values()]
    folded.refresh(other)
    assert [tensor.data_ptr() for tensor in folded.state_dict().values()] == pointers
    assert torch.equal(folded(x), exact(other, x))


def test_an_unknown_backbone_must_keep_its_tensors() -> None:
    folded = fold_backbone(nn.Sequential(nn.Conv2d(3, 8, 3)), torch.float32)
    with pytest.raises(ValueError, match=r"they differ in \['0.bias'\]"):
        folded.refresh(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False)))


def test_arguments_are_checked() -> None:
    with pytest.raises(TypeError, match=r"backbone must be an nn\.Module, got str"):
        fold_backbone("resnet50", torch.float32)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"dtype must be a floating point torch.dtype, got torch.int8"):
        fold_backbone(CompactTrunk(), torch.int8)


# What is reported


def test_folds_are_counted_from_shapes(folded32: dict[type[nn.Module], FoldedBackbone]) -> None:
    folds = {fold.name: fold.flops_saved for fold in folded32[ResNet50].folds}
    # Per stage at sides 56, 28, 14, 7: first and other blocks of width w have batch norms over w at the side (the
    # first block's first one still at the side before it), w and 4w; the downsample branch has one more over 4w.
    elements, downsample = 64 * 112**2, 0
    before = 56
    for width, blocks, side in [(64, 3, 56), (128, 4, 28), (256, 6, 14), (512, 3, 7)]:
        elements += width * before**2 + (blocks - 1) * width * side**2 + blocks * 5 * width * side**2
        downsample += 4 * width * side**2
        before = side
    assert folds == {"batch-norm": 2 * (elements + downsample), "downsample-bias": downsample}


def test_folds_of_hrnet(
    trunks: dict[type[nn.Module], nn.Module], folded32: dict[type[nn.Module], FoldedBackbone]
) -> None:
    folds = {fold.name: fold.flops_saved for fold in folded32[HRNetW64].folds}
    sizes = batch_norm_sizes(trunks[HRNetW64])
    assert len(sizes) == sum(isinstance(module, nn.BatchNorm2d) for module in trunks[HRNetW64].modules())
    assert folds["batch-norm"] == 2 * sum(sizes.values())
    # Heads of 128, 256, 512, 1024 channels at 56, 28, 14, 7, and layer1's 256 at 56.
    assert folds["downsample-bias"] == 256 * 56**2 + sum((128 << i) * (56 >> i) ** 2 for i in range(4))
    # A term from a finer branch has the target's size; one from a coarser branch has the target's width, its own side.
    saved = 0
    for branches, modules in [(2, 1), (3, 4), (4, 3)]:
        for target in range(branches):
            terms = [
                (64 << target) * (56 >> max(source, target)) ** 2 for source in range(branches) if source != target
            ]
            kept = terms[target - 1] if target else terms[-1]
            saved += modules * (sum(terms) - kept)
    assert folds["exchange bias"] == saved
