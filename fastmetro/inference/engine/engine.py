"""`fastmetro.compile`: a trained network in, an engine with the same call out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fastmetro.inference.engine.backbones import FoldedBackbone, fold_backbone
from fastmetro.inference.engine.graphs import Graphs, Outputs, searched
from fastmetro.inference.engine.pipeline import overlap
from fastmetro.inference.engine.precision import TensorFloat32
from fastmetro.inference.engine.preprocessing import check_images, pixel_constants, resize
from fastmetro.inference.engine.report import EngineReport
from fastmetro.inference.engine.savings import transformer_folds
from fastmetro.inference.engine.transformers import FoldedTransformers
from fastmetro.inference.engine.weights import AUTO
from fastmetro.inference.images import CROP_SIZE
from fastmetro.models.network import FastMETRO
from fastmetro_kernels.fused import normalize_pixels

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MOST_GRAPHS = 8


def compile(  # its name in the package is fastmetro.compile
    model: FastMETRO,
    batch_size: int = 1,
    dtype: torch.dtype | None = None,
    max_graphs: int = MOST_GRAPHS,
    convolutions: str = AUTO,
) -> Engine:
    """Turn a trained network into an engine for inference on the network's device.

    Everything that does not depend on the image is folded (``engine.report`` lists it), weights are cast once, and on a
    GPU each number of images is a CUDA graph. The network stays as it is and is not kept.

    A float32 engine on a GPU takes PyTorch's TF32 settings of this moment and keeps them, also for numbers of images
    that come later. PyTorch lets convolutions use TF32 unless ``torch.backends.cudnn.allow_tf32`` is set to False.

    Args:
        model: any FastMETRO, on the device that the engine shall use.
        batch_size: number of images to prepare for; others are prepared when they first come.
        dtype: of weights and activations; by default float16 on a GPU and float32 on a CPU. Heads and upsampling are
            always float32 (or float64).
        max_graphs: CUDA graphs that are kept; beyond, the least recently used is given up.
        convolutions: who computes the backbone's: by default what was measured to be fastest for each layer and number
            of images; ``"library"`` leaves this project's kernel out.

    Raises:
        TypeError: ``model`` is not a FastMETRO.
        ValueError: ``batch_size`` or ``max_graphs`` is not positive, ``dtype`` is not one of ``DTYPES``, or
            ``convolutions`` is unknown.
    """
    if not isinstance(model, FastMETRO):
        raise TypeError(f"model must be a FastMETRO, got {type(model).__name__}")
    for name, value in (("batch_size", batch_size), ("max_graphs", max_graphs)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    device = model.conv_1x1.weight.device
    if dtype is None:
        dtype = torch.float16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    training = model.training
    model.eval()
    try:
        return Engine(model, batch_size, dtype, device, max_graphs, convolutions)
    finally:
        model.train(training)


class Engine:
    """See :func:`fastmetro.compile`. Calls are safe from several threads and streams.

    Attributes:
        batch_size, dtype, device: as compiled.
        report: what was folded, and the largest difference to the network that was measured.
    """

    def __init__(
        self,
        model: FastMETRO,
        batch_size: int,
        dtype: torch.dtype,
        device: torch.device,
        max_graphs: int,
        convolutions: str,
    ) -> None:
        self.batch_size, self.dtype, self.device = batch_size, dtype, device
        self._backbone = fold_backbone(model.backbone, dtype, convolutions)
        self._transformers = FoldedTransformers(model, dtype, device)
        self._mean, self._scale = pixel_constants(device)
        self._work = _Work(self._backbone, self._transformers, self._backbone.pixel_constants(device))
        # A singular value decomposition cannot be part of a CUDA graph, so this head runs behind it.
        self._smpl_head: nn.Module | None = None
        if model.config.smpl_head:
            self._smpl_head = copy.deepcopy(model.smpl_parameter_regressor).to(self._transformers.heads_dtype)
        self._tf32 = TensorFloat32.current()
        self._graphs = Graphs(self._work, device, dtype, max_graphs, self._tf32) if device.type == "cuda" else None
        noise = torch.randn(batch_size, 3, CROP_SIZE, CROP_SIZE, generator=torch.Generator().manual_seed(0))
        example = noise.to(device)
        difference = _largest_difference(self(example), _plain_outputs(model, example))
        folds = (*self._backbone.folds, *transformer_folds(model))
        self.report = EngineReport(device, dtype, folds, difference, self._graphs is not None)
        if self._graphs is not None:
            self._graphs.prepare(torch.zeros(batch_size, CROP_SIZE, CROP_SIZE, 3, dtype=torch.uint8))

    def __call__(self, images: Tensor | np.ndarray) -> Outputs:
        """Recover meshes.

        Args:
            images: uint8 RGB crops [B, S, S, 3], resized and normalised on the device; or floating point
                [B, 3, H, W], normalised with the ImageNet mean and deviation. On any device; pinned memory is copied
                without waiting.

        Returns:
            The outputs of ``FastMETRO.forward``, as new float32 tensors on the engine's device.

        Raises:
            TypeError, ValueError: see :func:`~fastmetro.inference.engine.preprocessing.check_images`.
        """
        if self._graphs is not None and isinstance(images, Tensor) and not torch.cuda.is_current_stream_capturing():
            # Not in inference mode yet: whatever is ahead of a graph's launch delays it.
            outputs = self._graphs.again(images)
            if outputs is not None:
                return outputs if self._smpl_head is None else self._with_smpl(outputs)
        return self._checked(images)

    @torch.inference_mode()
    def _checked(self, images: Tensor | np.ndarray) -> Outputs:
        """A call with images unlike earlier ones, or without a graph of the engine's own."""
        images = torch.as_tensor(images)
        check_images(images)
        if len(images) == 0:
            one = self(images.new_zeros(1, *images.shape[1:]))
            return {name: value[:0] for name, value in one.items()}
        if images.dtype == torch.uint8 and images.shape[1] != CROP_SIZE:
            images = normalize_pixels(resize(images.to(self.device)), self._mean, self._scale, self.dtype)
        if self._graphs is None:
            outputs = self._work(images.to(self.device))
        elif torch.cuda.is_current_stream_capturing():
            with self._tf32.applied():
                outputs = self._work(images.to(self.device))
        else:
            outputs = self._graphs(images)
        return outputs if self._smpl_head is None else self._with_smpl(outputs)

    @torch.inference_mode()
    def _with_smpl(self, outputs: Outputs) -> Outputs:
        """With those of the head that runs behind the graph."""
        assert self._smpl_head is not None
        outputs["pred_rotmat"], outputs["pred_betas"] = self._smpl_head(outputs["pred_3d_vertices_intermediate"])
        return outputs

    def stream(self, batches: Iterable[Tensor | np.ndarray], to_host: bool = False) -> Iterator[Outputs]:
        """Outputs for one batch after the other; copies run beside the work on the batch before.

        Args:
            batches: as for a call, of at most ``batch_size`` images and alike but for their number.
            to_host: whether outputs come back to the host's memory.

        Raises:
            ValueError: a batch is larger than ``batch_size`` or unlike the first one.
        """
        return overlap(self, batches, to_host)

    @torch.no_grad()
    def refresh(self, model: FastMETRO) -> None:
        """Take the weights of a network like the compiled one, in place: captured graphs go on with the new ones.

        Raises:
            ValueError: the network is of another configuration.
        """
        transformers = self._transformers
        if model.config != transformers.config or model.num_vertices != transformers.num_vertices:
            raise ValueError(
                f"model: the engine was compiled for {transformers.config} and {transformers.num_vertices} coarse "
                f"vertices, got {model.config} and {model.num_vertices}"
            )

        def fold() -> None:
            self._backbone.refresh(model.backbone)
            transformers.fold(model)
            if self._smpl_head is not None:
                self._smpl_head.load_state_dict(model.smpl_parameter_regressor.state_dict())

        if self._graphs is None:
            fold()
        else:
            self._graphs.alone(fold)

    @torch.inference_mode()
    def parts(self) -> dict[str, Callable[[], object]]:
        """For profiling: each part alone, at the engine's batch size, on fixed inputs and without a graph.

        "after the backbone" is all but the first, as they run in the engine: partly beside each other.
        """
        network = self._transformers
        images = torch.zeros(self.batch_size, 3, CROP_SIZE, CROP_SIZE, dtype=self.dtype, device=self.device)
        images = images.contiguous(memory_format=torch.channels_last)
        features = self._backbone(images).clone()
        encoded, read = network.encode_first(features)
        _, read_2 = network.encode_again(encoded, read)
        tokens = network.decode_first(read)
        last = network.decode_second(tokens, read_2)

        def encode() -> object:
            return network.encode_again(*network.encode_first(features))

        def decode() -> object:
            return network.decode_second(network.decode_first(read), read_2)

        work: dict[str, Callable[[], object]] = {
            "backbone": lambda: self._backbone(images),
            "encoder": encode,
            "decoder": decode,
            "upsampling": lambda: network.place(last),
            "after the backbone": lambda: network(features),
        }
        return {name: self._as_captured(part) for name, part in work.items()}

    def _as_captured(self, work: Callable[[], object]) -> Callable[[], object]:
        """With the settings under which graphs are captured."""

        @torch.inference_mode()
        def run_part() -> object:
            with searched(self.dtype):
                return work()

        return run_part


@dataclass(frozen=True, eq=False)
class _Work:
    """What is captured. The graphs hold it, and it does not hold the engine.

    So an engine that nobody holds any more is freed at once, its graphs with it. In a cycle it would wait for Python's
    collector, which does not know how much memory of the GPU it waits for.
    """

    backbone: FoldedBackbone
    transformers: FoldedTransformers
    pixel_constants: tuple[Tensor, Tensor]

    def __call__(self, images: Tensor) -> Outputs:
        """All but the SMPL head, of pixels of the right size, or of normalised images, on the device."""
        if images.dtype == torch.uint8:
            features = self.backbone.of_bytes(images, *self.pixel_constants)
        else:
            features = self.backbone(images)
        outputs: Outputs = self.transformers(features)
        return outputs


@torch.no_grad()
def _plain_outputs(model: FastMETRO, images: Tensor) -> Outputs:
    """Of the network in float32, or in float64 where that is its precision."""
    own = model.conv_1x1.weight.dtype
    precise = torch.promote_types(own, torch.float32)
    outputs: Outputs = (model if own == precise else copy.deepcopy(model).to(precise))(images.to(precise))
    return outputs


def _largest_difference(outputs: Outputs, expected: Outputs) -> float:
    return max((outputs[name].double() - expected[name].double()).abs().max().item() for name in expected)
