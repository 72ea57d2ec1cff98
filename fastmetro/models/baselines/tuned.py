"""FastMETRO as fast as plain PyTorch runs it: the bar for the inference engine. Nothing of `fastmetro_kernels` runs.

What somebody gets who knows PyTorch well and writes no kernels:

- weights in half precision, convolutions in channels_last, batch norm folded into them;
- batch-first tokens with packed projections, `scaled_dot_product_attention` that returns no weights; the joint and
  vertex tokens are the same for every sample up to the first cross-attention and computed once for all of them;
- the mask as an additive bias in the dtype of the queries with aligned rows, so that no call converts or pads it;
- both upsampling steps as one dense matrix, one matrix product for the whole batch;
- `torch.compile` with CUDA graphs and static shapes. Inductor's freezing folds what depends on weights alone, such as
  the projections of the first self-attention; attention itself it never folds, because the operator may be random.

Folding by hand what is special to this network (the image-independent prefix of the decoder) is left to the engine.

Outputs keep the dtype of the weights where that is faster: the upsampled meshes are in half precision, camera, joints
and coarse vertices in float32 as in :class:`fastmetro.models.network.FastMETRO`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import cast

import scipy.sparse as sp
import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fastmetro.models.attention import TokenAttention, dense_attention
from fastmetro.models.network import FastMETRO
from fastmetro.models.upsampling import FixedUpsampling, check_steps

MASKS = ("bias", "bool")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_IMAGE_SIZE = 224


class DenseTokenAttention(nn.Module):
    """Decoder self-attention by `scaled_dot_product_attention` under a constant mask.

    Args:
        attention: the masked attention to replace, made with backend "dense".
        mask: "bias": 0 or -inf in the dtype of the queries, rows aligned to 16 bytes; "bool": as it is.
        dtype: of the bias.
    """

    mask: Tensor | None

    def __init__(self, attention: TokenAttention, mask: str, dtype: torch.dtype) -> None:
        super().__init__()
        allowed = attention.mask
        if mask == "bias" and allowed is not None:
            rows = F.pad(allowed, (0, -allowed.shape[-1] % (16 // dtype.itemsize)))
            bias = torch.zeros(rows.shape, dtype=dtype, device=rows.device).masked_fill_(~rows, -torch.inf)
            allowed = bias[..., : allowed.shape[-1]]
        self.register_buffer("mask", allowed, persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        """Attend among tokens: q, k, v [B, L, H, D] -> [B, L, H, D]."""
        return dense_attention(q, k, v, dropout_p, self.mask)


class DenseUpsampling(nn.Module):
    """Constant upsampling as one dense product for the whole batch.

    Args:
        matrix: M x N, from N coarse to M fine vertices.
        dtype: of the product and of its result.
        device: where the matrix lies.
    """

    weight: Tensor

    def __init__(self, matrix: sp.csr_array, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("weight", torch.from_numpy(matrix.toarray()).to(device, dtype), persistent=False)

    def forward(self, vertices: Tensor) -> Tensor:
        """Map vertices [B, N, 3] to [B, M, 3]; the result is a transposed view."""
        return F.linear(vertices.to(self.weight.dtype).transpose(1, 2), self.weight).transpose(1, 2)


class TunedNetwork:
    """A network that is ready to be called: images in, the published keys out, no gradients.

    The first call with a new shape compiles where `compile` was asked for, and captures a CUDA graph. On a GPU the
    results are then memory of that graph and hold until the next call.

    Attributes:
        network: the module that runs, in evaluation mode.
        description: what was done to it, for tables.
    """

    def __init__(self, network: FastMETRO, dtype: torch.dtype, compile: bool, freezing: bool, description: str) -> None:
        self.network = network
        self.description = description
        self._dtype = dtype
        self._device = network.xyz_regressor.weight.device
        self._freezing = compile and freezing
        self._warm_ups = 3 if compile else 1  # to compile, to warm up, to capture
        self._seen: set[torch.Size] = set()
        self._run: Callable[[Tensor], dict[str, Tensor]] = self._forward
        if compile:
            mode = "reduce-overhead" if self._device.type == "cuda" else "default"
            self._run = torch.compile(self._forward, mode=mode, dynamic=False, fullgraph=True)

    def _forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.network(images.to(self._dtype, memory_format=torch.channels_last))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Recover meshes from normalised images [B, 3, H, W] of any floating dtype, on the network's device.

        Raises:
            ValueError: `images` is on another device or not floating point.
        """
        if images.device.type != self._device.type or not images.is_floating_point():
            raise ValueError(f"images must be floating point on {self._device}, got {images.dtype} on {images.device}")
        if images.shape in self._seen:
            return self._run(images)
        with (  # inductor and cuDNN choose when they first see a shape, and what they chose stays
            torch._inductor.config.patch(freezing=self._freezing),
            _convolution_search(),
        ):
            for _ in range(self._warm_ups):
                out = self._run(images)
        self._seen.add(images.shape)
        return out


@contextlib.contextmanager
def _convolution_search() -> Iterator[None]:
    """Let cuDNN time its algorithms for every new shape; restored afterwards."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32 in convolutions; restored afterwards."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def tuned_network(
    model: FastMETRO,
    dtype: torch.dtype = torch.float16,
    compile: bool = True,
    *,
    mask: str = "bias",
    freezing: bool = True,
) -> TunedNetwork:
    """The strongest plain-PyTorch version of `model`, on its device; the model is left as it is.

    Args:
        model: trained or not; evaluation mode is used. Its weights are copied.
        dtype: of weights and activations: float16, bfloat16, float32 or float64.
        compile: `torch.compile`, with CUDA graphs on a GPU ("reduce-overhead").
        mask: how the decoder's self-attention is masked: "bias" or "bool".
        freezing: let inductor fold constants; only with `compile`, and not in float64, where it fails on a CPU.

    Raises:
        ValueError: an argument is not one of the accepted values.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    if mask not in MASKS:
        raise ValueError(f"mask must be one of {', '.join(map(repr, MASKS))}, got {mask!r}")
    freezing = freezing and dtype != torch.float64
    network = FastMETRO(replace(model.config, attention="dense"), copy.deepcopy(model.backbone), model.mesh)
    network.load_state_dict(model.state_dict(), strict=True)
    device, precise = model.xyz_regressor.weight.device, model.xyz_regressor.weight.dtype
    network = network.to(device=device, dtype=precise).eval().requires_grad_(False)
    folded = fold_batch_norm(network.backbone)
    _replace_upsampling(network, dtype, device)
    network.token_attention = DenseTokenAttention(network.token_attention, mask, dtype)  # type: ignore[assignment]
    network.to(dtype)
    for part in (network.backbone, network.conv_1x1):
        part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    how = "not compiled"
    if compile:
        graphs = ", CUDA graphs" if device.type == "cuda" else ""
        how = f"compiled{', frozen' if freezing else ''}{graphs}"
    name = str(dtype).removeprefix("torch.")
    return TunedNetwork(network, dtype, compile, freezing, f"{name}, {how}, {mask} mask, {folded} batch norms folded")


def _replace_upsampling(network: FastMETRO, dtype: torch.dtype, device: torch.device) -> None:
    """Dense matrices in place of sparse ones."""
    steps = check_steps(network.mesh.upsampling, network.num_vertices)
    matrices = {"coarse2intermediate_upsample": steps[0], "intermediate2fine_upsample": steps[-1]} if steps else {}
    if steps:
        matrices["coarse2fine_upsample"] = steps[-1] @ steps[0] if len(steps) == 2 else steps[0]
    for name, matrix in matrices.items():
        if isinstance(getattr(network, name), FixedUpsampling):
            setattr(network, name, DenseUpsampling(matrix, dtype, device))


@torch.no_grad()
def fold_batch_norm(backbone: nn.Module) -> int:
    """Fold every batch norm that directly follows a convolution into its weights, in place; returns how many.

    Which follows which is read off one forward pass in evaluation mode, not off names. Batch norms elsewhere stay.

    Args:
        backbone: in evaluation mode and float32 or float64; takes images [1, 3, 224, 224] if it has batch norms.

    Raises:
        ValueError: the folded backbone does not compute the same, as where a convolution's output is used twice.
    """
    norms = {name for name, module in backbone.named_modules() if isinstance(module, nn.BatchNorm2d)}
    if not norms:
        return 0
    parameter = next(backbone.parameters())
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 3, _IMAGE_SIZE, _IMAGE_SIZE, generator=generator).to(parameter)
    with _full_precision():
        pairs, expected = _convolution_of_norm(backbone, images)
        for norm, convolution in pairs.items():
            parts = [backbone.get_submodule(part) for part in (convolution, norm)]
            folded = fuse_conv_bn_eval(*cast("tuple[nn.Conv2d, nn.BatchNorm2d]", parts))
            backbone.set_submodule(convolution, folded.requires_grad_(False))
            backbone.set_submodule(norm, nn.Identity())
        actual = backbone(images)
    error = float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    limit = 1e4 * torch.finfo(parameter.dtype).eps
    if not error <= limit:
        raise ValueError(f"backbone: folding its batch norms changes its output by {error:.1e}, more than {limit:.1e}")
    return len(pairs)


def _convolution_of_norm(backbone: nn.Module, images: Tensor) -> tuple[dict[str, str], Tensor]:
    """Names of batch norms and of the convolutions that feed them, and the backbone's output."""
    made: dict[int, tuple[str, Tensor]] = {}  # the tensors are kept, so that no address serves twice
    pairs: dict[str, str] = {}
    calls: dict[str, int] = {}
    handles = []

    def after_convolution(name: str, output: Tensor) -> None:
        calls[name] = calls.get(name, 0) + 1
        made[id(output)] = (name, output)

    def before_norm(name: str, given: Tensor) -> None:
        calls[name] = calls.get(name, 0) + 1
        if id(given) in made:
            pairs[name] = made[id(given)][0]

    for name, module in backbone.named_modules():
        if isinstance(module, nn.Conv2d):
            hook = lambda _module, _inputs, output, name=name: after_convolution(name, output)  # noqa: E731
            handles.append(module.register_forward_hook(hook))
        elif isinstance(module, nn.BatchNorm2d):
            before = lambda _module, inputs, name=name: before_norm(name, inputs[0])  # noqa: E731
            handles.append(module.register_forward_pre_hook(before))
    try:
        output = backbone(images)
    finally:
        for handle in handles:
            handle.remove()
    once = {norm: convolution for norm, convolution in pairs.items() if calls[norm] == calls[convolution] == 1}
    return once, output
