"""One training step on a batch that is on the device: eager, or as one CUDA graph."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Literal

import torch
from torch import Tensor, nn

from fastmetro.cuda_graphs import capture, warm_up
from fastmetro.data.labels import MeshLabels
from fastmetro.distributed import World
from fastmetro.models.backbones.half_weights import KeptFresh, gradient_of, kept_weights, refresh_half_weights
from fastmetro.models.half_matrices import half_matrices_in_use
from fastmetro.training.objective import Objective
from fastmetro.training.optimizer import ClippedAdamW

Precision = Literal["bf16", "fp16", "fp32"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
Network = Callable[[Tensor], Mapping[str, Tensor]]


class TrainingStep:
    """Forward pass, loss, backward pass, mean of the gradients over processes, clipping, update. Nothing waits.

    Args:
        model: whose parameters are trained.
        network: the model, or what torch.compile made of it.
        objective: the losses.
        optimizer: over the model's parameters. A ClippedAdamW clips by itself, but in "fp16".
        clip: largest global norm of the gradient.
        precision: of the forward pass, by autocast; "fp16" scales the loss.
        accumulate: into how many parts a batch is split, whose gradients are summed.
        world: the processes that share the batch.

    Attributes:
        names: of the values that a step returns.
        scaler: of the loss; it does nothing unless the precision is "fp16".

    Raises:
        ValueError: the model keeps half-precision weights, and their gradients would be lost: with another optimizer
            than ClippedAdamW, or in "fp16". Also raised by a step, where they came later.
    """

    def __init__(
        self,
        model: nn.Module,
        network: Network,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        *,
        clip: float,
        precision: Precision,
        accumulate: int = 1,
        world: World = World(),  # noqa: B008 - frozen
    ) -> None:
        self.model, self.network, self.objective, self.optimizer = model, network, objective, optimizer
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.device = self.parameters[0].device
        self.clip, self.precision, self.accumulate, self.world = clip, precision, accumulate, world
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.names = ("loss", "gradient_norm", *objective.term_names)
        self._check_half_weights()

    def _check_half_weights(self) -> None:
        if not kept_weights(self.parameters):
            return
        if not isinstance(self.optimizer, ClippedAdamW):
            raise ValueError(f"half-precision weights need ClippedAdamW, got {type(self.optimizer).__name__}")
        if self.precision == "fp16":
            raise ValueError("half-precision weights do not go with precision fp16, whose gradients are scaled")

    def __call__(self, images: Tensor, labels: MeshLabels) -> Tensor:
        """Train on this process's share of a batch.

        Returns:
            float32 [len(names)]; over processes their means are the values of the whole batch. The norm is that
            before clipping, 0 where the step was left out because its gradient was not finite ("fp16").
        """
        self._check_half_weights()
        self.optimizer.zero_grad(set_to_none=True)
        values = self._gradients(images, labels)
        pairs = ((parameter, gradient_of(parameter)) for parameter in self.parameters)
        self.world.average_gradients((parameter, found) for parameter, found in pairs if found is not None)
        norm = self._update()
        return torch.cat([values[:1], norm.detach().float().view(1), values[1:]])

    def _update(self) -> Tensor:
        """Clip and step; returns the norm."""
        if isinstance(self.optimizer, ClippedAdamW) and self.precision != "fp16":
            return self.optimizer.step_clipped(self.clip)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return torch.where(norm.isfinite(), norm, 0.0) if self.precision == "fp16" else norm

    def _gradients(self, images: Tensor, labels: MeshLabels) -> Tensor:
        """Adds up the gradients of all parts; returns the loss and its terms."""
        counts = None
        if self.accumulate > 1 or self.world.size > 1:
            counts = self.world.sum(self.objective.counts(labels)) / self.world.size
        total: Tensor | None = None
        for part in range(self.accumulate):
            # Every so manyth: samples of one data set lie side by side, and batch norms should see all sets.
            place = slice(part, None, self.accumulate)
            chosen = images if self.accumulate == 1 else images[place].contiguous(memory_format=torch.channels_last)
            loss, values = self._forward(chosen, labels.map(operator.itemgetter(place)), counts)
            self.scaler.scale(loss).backward()
            total = values if total is None else total + values
        assert total is not None
        return total

    @contextlib.contextmanager
    def _in_precision(self) -> Iterator[None]:
        """Autocast, and with it the half-precision matrices."""
        dtype = _DTYPES.get(self.precision)
        if dtype is None:
            with torch.autocast(self.device.type, enabled=False):
                yield
        else:
            with half_matrices_in_use(self.model, dtype), torch.autocast(self.device.type, dtype):
                yield

    def _forward(self, images: Tensor, labels: MeshLabels, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        with self._in_precision():
            outputs = self.network(images)
        loss, terms = self.objective(outputs, labels, counts)
        return loss, torch.stack([loss.detach(), *(terms[name] for name in self.objective.term_names)]).float()


class CapturedStep:
    """A step as one CUDA graph, replayed for batches of one size.

    Capturing runs the step a few times; weights, statistics, optimizer and random numbers are put back afterwards.

    Args:
        step: in float32 or bfloat16, with a capturable optimizer.
        images, labels: a batch like those that will come.

    Raises:
        ValueError: the step cannot be captured.
    """

    def __init__(self, step: TrainingStep, images: Tensor, labels: MeshLabels) -> None:
        if step.device.type != "cuda":
            raise ValueError(f"a step can be captured on a CUDA device only, got {step.device}")
        if step.precision == "fp16":
            raise ValueError("a step in fp16 cannot be captured: its loss scale changes; use bf16 or fp32")
        self.names = step.names
        self._step = step  # the graph works in the memory of its weights, and does not keep them
        self._images = images.clone(memory_format=torch.preserve_format)
        self._labels = labels.clone()
        self._mine = _by_name(self._images, self._labels)
        self._alike = _alike(self._mine)
        before = _Snapshot(step)
        warm_up(self._run, step.device)
        step.optimizer.zero_grad(set_to_none=True)
        self._graph, self._values = capture(self._run, step.device)
        before.restore(step)
        self._kept = KeptFresh(step.parameters)

    def _run(self) -> Tensor:
        return self._step(self._images, self._labels)

    def __call__(self, images: Tensor, labels: MeshLabels) -> Tensor:
        """As :meth:`TrainingStep.__call__`; the next call overwrites what is returned.

        Raises:
            ValueError: the batch has another shape than that of the capture, or other labels.
        """
        if images.shape != self._images.shape:
            raise ValueError(f"images must be {list(self._images.shape)}, as captured, got {list(images.shape)}")
        self._take_over(images, labels)
        self._kept.refresh()
        self._graph.replay()
        return self._values

    def _take_over(self, images: Tensor, labels: MeshLabels) -> None:
        """Copy a batch to where the graph reads it, with one call for all of a dtype: the device waits for the host.

        The most bytes first: the host prepares the rest while they are copied.
        """
        theirs = _by_name(images, labels)
        if theirs.keys() != self._mine.keys():
            raise ValueError(f"labels must be {', '.join(self._mine)}, as captured, got {', '.join(theirs)}")
        for names in self._alike:
            torch._foreach_copy_([self._mine[name] for name in names], [theirs[name] for name in names])


def _by_name(images: Tensor, labels: MeshLabels) -> dict[str, Tensor]:
    """The tensors of a batch."""
    found = {field.name: getattr(labels, field.name) for field in fields(labels)}
    return {"images": images} | {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _alike(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Names by dtype, those of the most bytes first."""
    found: dict[torch.dtype, list[str]] = {}
    for name, tensor in tensors.items():
        found.setdefault(tensor.dtype, []).append(name)
    return sorted(found.values(), key=lambda names: -sum(tensors[name].nbytes for name in names))


class _Snapshot:
    """Everything that a step changes."""

    def __init__(self, step: TrainingStep) -> None:
        self._tensors = [(value, value.detach().clone()) for value in _state(step.model)]
        self._optimizer = {
            parameter: {name: value.clone() for name, value in values.items() if isinstance(value, Tensor)}
            for parameter, values in step.optimizer.state.items()
        }
        self._random = torch.cuda.get_rng_state(step.device)

    @torch.no_grad()
    def restore(self, step: TrainingStep) -> None:
        for value, before in self._tensors:
            value.copy_(before)
        for parameter, values in step.optimizer.state.items():
            saved = self._optimizer.get(parameter, {})
            for name, value in values.items():
                if isinstance(value, Tensor):
                    value.copy_(saved[name]) if name in saved else value.zero_()
        refresh_half_weights(step.model)
        torch.cuda.set_rng_state(self._random, step.device)


def _state(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
