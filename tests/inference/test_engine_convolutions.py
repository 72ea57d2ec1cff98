"""The engine's blocks and trunks on the convolution op, which runs on its reference here: layouts, merged branches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from backbone_cases import all_trunks, error, exact, images, randomize
from torch import Tensor, nn

import fastmetro
from fastmetro.inference.engine import convolution as seam
from fastmetro.inference.engine.backbones import fold_backbone
from fastmetro.inference.engine.convolution import basic_block, bottleneck, convolution, residual_chain
from fastmetro.inference.engine.weights import BlockWeights, ConvolutionWeights
from fastmetro.models import create_model
from fastmetro.models.backbones import CompactTrunk, HRNetW64, ResNet50
from fastmetro.models.backbones.blocks import BasicBlock, Bottleneck
from fastmetro_kernels import convolution as kernels
from fastmetro_kernels.convolution import ConvolutionConfig, JoinConfig, ending
from fastmetro_kernels.convolution.ending_configs import ALONE, FOLLOWED, FOLLOWING, JOINED, MEASURED, MODES, WIDENED
from fastmetro_kernels.convolution.join import join_reasons

Calls = list[dict[str, Any]]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What the ops were called with; pairs have their "following" weights."""
    seen: Calls = []
    op, pair = kernels.convolution, kernels.convolution_pair

    def watched(x: Tensor, weights: kernels.ConvolutionWeights, **options: Any) -> Tensor:
        seen.append({"weights": weights, **options})
        return op(x, weights, **options)

    def watched_pair(x: Tensor, weights: kernels.ConvolutionWeights, following: object, **options: Any) -> Any:
        seen.append({"weights": weights, "following": following, **options})
        return pair(x, weights, following, **options)

    monkeypatch.setattr(seam.kernels, "convolution", watched)
    monkeypatch.setattr(seam.kernels, "convolution_pair", watched_pair)
    return seen


def use(module: nn.Module, backend: str) -> None:
    for one in module.modules():
        if isinstance(one, ConvolutionWeights):
            one.backend = backend


@pytest.mark.parametrize(("kind", "run"), [(BasicBlock, basic_block), (Bottleneck, bottleneck)])
@pytest.mark.parametrize(("width", "stride"), [(64, 1), (64, 2), (None, 1)])
def test_blocks_are_the_plain_ones(
    kind: type[BasicBlock] | type[Bottleneck], run: Callable[..., Tensor], width: int | None, stride: int, calls: Calls
) -> None:
    channels = 64
    width = width or channels // kind.expansion  # without it the shortcut is the input
    block = randomize(kind(channels, width, stride))
    weights = BlockWeights(block, torch.float32)
    weights.load(block)
    use(weights, "reference")
    x = torch.randn(3, channels, 9, 7).to(memory_format=torch.channels_last)
    before = x.clone()
    with torch.no_grad():
        result = run(x, weights)
    assert error(result, exact(block, x)) < 1e-5
    assert torch.equal(x, before), "the input was written to"
    assert len(calls) == len(weights.convolutions)  # the downsample branch is not one of its own
    assert all(call["residual"] is None and call["second"] is None and call["relu"] for call in calls[:-1])
    merged = weights.downsample is not None
    assert (calls[-1]["second"] is x, calls[-1]["residual"] is x) == (merged, not merged)


def test_the_kernels_weights_are_the_engines_memory() -> None:
    block = randomize(Bottleneck(64, 16, 2))
    weights = BlockWeights(block, torch.float16)
    last, branch = cast(ConvolutionWeights, weights.convolutions[-1]), weights.downsample
    assert branch is not None
    laid_out = last.laid_out(branch)
    weights.load(block)  # after they were laid out
    assert laid_out is not None and laid_out.second_weight is not None and last.bias is not None
    assert (
        laid_out.weight.data_ptr() == last.weight.data_ptr() and laid_out.bias.data_ptr() == last.float_bias.data_ptr()
    )
    assert laid_out.second_weight.data_ptr() == branch.weight.data_ptr() and laid_out.second_stride == 2
    assert torch.equal(laid_out.weight.permute(0, 3, 1, 2), last.weight)
    assert torch.equal(laid_out.bias.half(), last.bias) and not torch.equal(laid_out.bias, last.bias.float())


def test_what_the_kernel_cannot_take_is_the_librarys(calls: Calls) -> None:
    for layer in (
        nn.Conv2d(3, 64, 7, stride=2, padding=3),
        nn.Conv2d(16, 24, 3, padding=1),
        nn.Conv2d(16, 16, 3, stride=(1, 2), padding=1),
        nn.Conv2d(16, 16, 3, padding=3),
    ):
        weights = ConvolutionWeights(layer, torch.float32)
        weights.load(layer.weight.detach(), cast(Tensor, layer.bias).detach())
        assert weights.laid_out() is None
        weights.backend = "reference"
        x = torch.randn(1, layer.in_channels, 9, 9).to(memory_format=torch.channels_last)
        with torch.no_grad():
            torch.testing.assert_close(convolution(x, weights), layer(x))
    assert not calls


@pytest.mark.parametrize("kind", [ResNet50, CompactTrunk, HRNetW64])
def test_trunks_are_the_plain_ones_also_after_a_refresh(kind: type[nn.Module], calls: Calls) -> None:
    trunk = all_trunks()[kind]
    folded, x = fold_backbone(trunk, torch.float32, "reference"), images(2, 64)
    pointers = {name: tensor.data_ptr() for name, tensor in folded.state_dict().items()}
    assert error(folded(x), exact(trunk, x)) < 1e-4 and calls
    other = randomize(copy.deepcopy(trunk), seed=1)
    folded.refresh(other)
    assert {name: tensor.data_ptr() for name, tensor in folded.state_dict().items()} == pointers
    assert error(folded(x), exact(other, x)) < 1e-4
    assert torch.equal(folded(x), fold_backbone(other, torch.float32, "reference")(x))
    if kind is ResNet50:
        first = calls[: 48 - 12]
        assert sum("following" in call for call in first) == 12
        assert sum(call["second"] is not None for call in first) == 4
    if kind is HRNetW64:
        heads = [call for call in calls if call.get("late")]
        assert len(heads) % 3 == 0 and heads and all(call["relu"] for call in heads)


def test_auto_asks_the_choice_and_library_never(monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors that say they are on a GPU the op is asked, layer by layer, whether it is to run."""
    asked: list[bool] = []

    class OnGpu(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

    def choose(
        x: Tensor, weights: object, residual: Tensor | None, second: Tensor | None, scale: int
    ) -> ConvolutionConfig | None:
        asked.append(second is not None)
        return ConvolutionConfig(64, 1, 2) if second is not None else None

    def op(
        x: Tensor,
        weights: kernels.ConvolutionWeights,
        *,
        relu: bool,
        late: bool,
        backend: str,
        scale: int,
        **inputs: Tensor,
    ) -> Tensor:
        assert relu and not late and backend == "auto" and inputs["residual"] is None and scale == 1
        return torch.zeros(())

    monkeypatch.setattr(seam.kernels, "choose", choose)
    monkeypatch.setattr(seam.kernels, "convolution", op)
    monkeypatch.setattr(seam, "_cudnn_fuses", lambda x: False)
    block = randomize(BasicBlock(16, 32, 2))
    weights = BlockWeights(block, torch.float32)
    x = torch.randn(1, 16, 8, 8).to(memory_format=torch.channels_last).as_subclass(OnGpu)
    with torch.no_grad():
        assert basic_block(x, weights).shape == ()
        assert asked == [False, True]
        use(weights, "library")
        assert basic_block(x, weights).shape == (1, 32, 4, 4)
        assert len(asked) == 2


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("stride", [1, 2])
def test_ends_of_first_blocks_are_joined_where_that_was_measured(
    stride: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On tensors that say they are on a GPU: equal to the library's two convolutions, which it then does not call."""
    dtype = torch.float32 if backend == "reference" else torch.float16
    if backend == "triton" and (why := join_reasons(torch.device("cpu"), dtype)):
        pytest.skip("; ".join(why))
    joined: list[JoinConfig | None] = []
    op = kernels.convolution_join

    class OnGpu(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

    def plain(x: Tensor) -> Tensor:
        return x.as_subclass(torch.Tensor)  # type: ignore[arg-type]

    def join(x: Tensor, weights: kernels.ConvolutionWeights, second: Tensor, *, config: JoinConfig | None) -> Tensor:
        joined.append(config)
        return op(plain(x), weights, plain(second), config=config, backend=backend)

    monkeypatch.setattr(seam.kernels, "convolution_join", join)
    monkeypatch.setattr(seam, "_cudnn_fuses", lambda x: False)
    tile = JoinConfig(64, 64, 32, 4, 2)
    chosen: dict[str, JoinConfig | None] = {"tile": None}
    monkeypatch.setattr(seam.kernels, "choose_join", lambda x, weights, second: chosen["tile"])
    block = randomize(Bottleneck(64, 48, stride))
    weights = BlockWeights(block, dtype)
    weights.load(block)
    x = torch.randn(2, 64, 9, 7).to(dtype, memory_format=torch.channels_last)
    with torch.no_grad():
        unmeasured = bottleneck(x.as_subclass(OnGpu), weights)
        assert not joined
        chosen["tile"] = tile
        result = plain(bottleneck(x.as_subclass(OnGpu), weights))
        assert joined == [tile]
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert error(result, exact(block, x)) <= 1.1 * error(unmeasured, exact(block, x)) + 1e-6
        bottleneck(x, weights)  # not on a GPU
        use(weights, "library")
        bottleneck(x.as_subclass(OnGpu), weights)
        basic = BlockWeights(randomize(BasicBlock(64, 48, stride)), dtype)  # its last convolution is 3 x 3
        basic_block(x.as_subclass(OnGpu), basic)
        plain_block = BlockWeights(randomize(Bottleneck(64, 16, 1)), dtype)  # the shortcut is the input
        bottleneck(x.as_subclass(OnGpu), plain_block)
    assert len(joined) == 1


class Ends:
    """The op for the ends of bottlenecks, by its reference, on tensors that say they are on a GPU; and a table for it.

    Attributes:
        calls: modes of the calls.
        convolutions: weights of all other convolutions.
    """

    class OnGpu(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

    def __init__(self, monkeypatch: pytest.MonkeyPatch, height: int, width: int, images: dict[str, int]) -> None:
        self.calls: list[str] = []
        self.convolutions: list[ConvolutionWeights] = []
        self._op, self._convolution = kernels.convolution_ending, seam.convolution
        monkeypatch.setattr(seam.kernels, "convolution_ending", self._ending)
        monkeypatch.setattr(seam, "convolution", self._watched)
        monkeypatch.setattr(seam, "_cudnn_fuses", lambda x: False)
        monkeypatch.setattr(ending, "ending_reasons", lambda device, dtype: [])
        for mode, fewest in images.items():
            monkeypatch.setitem(MEASURED, (height, width, mode), fewest)

    def _watched(self, x: Tensor, weights: ConvolutionWeights, *others: Any, **options: Any) -> Tensor:
        self.convolutions.append(weights)
        return self._convolution(x, weights, *others, **options)

    def _ending(self, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        plain = [one.as_subclass(torch.Tensor) if isinstance(one, Tensor) else one for one in arguments]
        wide, narrow = self._op(*plain, backend="reference")
        channels = 0 if narrow is None else narrow.shape[1]
        modes = [mode for mode in MODES if mode != JOINED and FOLLOWING[mode] == channels]
        self.calls.append(JOINED if plain[5] is not None else modes[0])
        return wide.as_subclass(self.OnGpu), None if narrow is None else narrow.as_subclass(self.OnGpu)


def chain_of_bottlenecks() -> tuple[nn.Sequential, list[BlockWeights]]:
    """ResNet-50's first stage, and the beginning of its second."""
    plain = randomize(
        nn.Sequential(Bottleneck(64, 64), Bottleneck(256, 64), Bottleneck(256, 64), Bottleneck(256, 128, 2))
    )
    blocks = []
    for block in plain:
        blocks.append(BlockWeights(cast(Bottleneck, block), torch.float32))
        blocks[-1].load(cast(Bottleneck, block))
    return plain, blocks


@pytest.mark.parametrize("modes", [(), (FOLLOWED,), (WIDENED,), (JOINED,), (JOINED, FOLLOWED, WIDENED)], ids=str)
def test_ends_of_bottlenecks_are_one_kernel_where_that_was_measured(
    modes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, blocks = chain_of_bottlenecks()
    ends = Ends(monkeypatch, 9, 7, dict.fromkeys(modes, 2))
    x = torch.randn(2, 64, 9, 7).to(memory_format=torch.channels_last)
    before = x.clone()
    with torch.no_grad():
        result = residual_chain(x.as_subclass(Ends.OnGpu), blocks)
        assert ends.calls == [mode for mode in (JOINED, FOLLOWED, WIDENED) if mode in modes]
        # Of 14 calls without a table, those of the downsample branches among them.
        taken = sum({JOINED: 4, FOLLOWED: 3, WIDENED: 3}[mode] for mode in modes)
        assert len(ends.convolutions) == len(set(ends.convolutions)) == 14 - taken
        assert error(result.as_subclass(torch.Tensor), exact(plain, x)) < 1e-5
        assert torch.equal(x, before), "the input was written to"
        count = len(ends.calls)
        residual_chain(x[:1].as_subclass(Ends.OnGpu), blocks)  # fewer images than measured
        residual_chain(x, blocks)  # not on a GPU
        for block in blocks:
            use(block, "library")
        residual_chain(x.as_subclass(Ends.OnGpu), blocks)
        for block in blocks:
            use(block, "reference")
        residual_chain(x.as_subclass(Ends.OnGpu), blocks)
    assert len(ends.calls) == count


def test_other_blocks_have_no_such_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two convolutions of 3 x 3; a stride; a second input of another width."""
    ends = Ends(monkeypatch, 8, 8, dict.fromkeys(MODES, 1))
    x = torch.randn(1, 64, 8, 8).to(memory_format=torch.channels_last)
    wide = torch.randn(1, 128, 8, 8).to(memory_format=torch.channels_last)
    cases = ((BasicBlock(64, 64), basic_block, x), (Bottleneck(64, 64, 2), bottleneck, x),
             (Bottleneck(128, 64), bottleneck, wide), (Bottleneck(64, 16), bottleneck, x))  # fmt: skip
    for block, run, given in cases:
        randomize(block)
        weights = BlockWeights(block, torch.float32)
        weights.load(block)
        with torch.no_grad():
            result = run(given.as_subclass(Ends.OnGpu), weights).as_subclass(torch.Tensor)
        assert error(result, exact(block, given)) < 1e-5
    assert not ends.calls
    block = randomize(Bottleneck(64, 64))
    weights = BlockWeights(block, torch.float32)
    weights.load(block)
    with torch.no_grad():
        result = bottleneck(x.as_subclass(Ends.OnGpu), weights).as_subclass(torch.Tensor)
    assert not ends.calls and error(result, exact(block, x)) < 1e-5  # nothing follows


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(ResNet50, [JOINED, FOLLOWED, WIDENED]), (HRNetW64, [JOINED, FOLLOWED, FOLLOWED, ALONE]), (CompactTrunk, [])],
)
def test_first_stages_of_trunks_take_the_kernel_for_ends(
    kind: type[nn.Module], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = all_trunks()[kind]
    folded, x = fold_backbone(trunk, torch.float32), images(2, 64)
    ends = Ends(monkeypatch, 16, 16, dict.fromkeys(MODES, 2))
    result = folded(x.as_subclass(Ends.OnGpu)).as_subclass(torch.Tensor)
    assert ends.calls == expected
    assert error(result, exact(trunk, x)) < 1e-4


def test_the_engine_has_the_option(calls: Calls) -> None:
    model = create_model("fastmetro-compact").eval()
    for option in ("auto", "library"):
        engine = fastmetro.compile(model, convolutions=option)
        backends = {one.backend for one in engine._backbone.modules() if isinstance(one, ConvolutionWeights)}
        assert backends == {option}
    assert not calls
    with pytest.raises(ValueError, match="convolutions must be one of 'auto', 'library', 'native', 'reference', got"):
        fastmetro.compile(model, convolutions="cudnn")
