"""AdamW with clipping, in three launches on a GPU, which also takes and writes half-precision copies of weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, StateDict

from fastmetro.models.backbones.half_weights import HalfCopy, gradient_of, half_copy
from fastmetro_kernels.adamw import AdamWGroup, Tables, adamw, same_layout

# As the groups of torch.optim.AdamW(fused=True, capturable=True) have them.
_FIXED: dict[str, Any] = {
    "amsgrad": False, "maximize": False, "foreach": None, "capturable": True, "differentiable": False, "fused": True,
    "decoupled_weight_decay": True,
}  # fmt: skip


class ClippedAdamW(torch.optim.Optimizer):
    """``torch.optim.AdamW(fused=True, capturable=True)`` with ``clip_grad_norm_`` in it; gradients are only read.

    Groups, state and ``state_dict`` are the same: checkpoints of either load into the other. Where a parameter has a
    half-precision copy (:func:`~fastmetro.models.backbones.half_weights.keep_half_weights`), the gradient may be in the
    copy's ``grad``, and the copy is written with the parameter.

    For CUDA graphs give a rate that is a tensor, and make a step before capturing one: tensors that are captured must
    have their moments. The optimizer must live as long as the graph.

    Args:
        params: parameters or groups of them, float32 (float64 with the reference), all on one device.
        lr: a number, or float32 tensor of one number on the parameters' device.
        betas, eps, weight_decay: as of ``torch.optim.AdamW``.
        backend: of :func:`fastmetro_kernels.adamw.adamw`.

    Raises:
        TypeError, ValueError: parameters or numbers that do not fit.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        backend: str = "auto",
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **_FIXED}
        super().__init__(params, defaults)
        self._backend = backend
        self._tables = Tables()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        devices = {parameter.device for parameter in parameters}
        if len(devices) > 1:
            raise ValueError(f"parameters must be on one device, got {', '.join(sorted(map(str, devices)))}")
        wrong = next((one.dtype for one in parameters if one.dtype not in (torch.float32, torch.float64)), None)
        if wrong is not None:
            raise TypeError(f"parameters must be float32 or float64, got {wrong}")
        for group in self.param_groups:
            rate, own = group["lr"], group["params"]
            if isinstance(rate, Tensor) and own and rate.device != own[0].device:
                raise ValueError(f"lr must be on {own[0].device}, as the parameters, got {rate.device}")
            adamw([_group(group)])  # of nothing: before anything is trained, what is wrong with the numbers
        self._claim()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_backend": self._backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_tables", Tables())

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters that have gradients; returns what the closure does, if there is one.

        Raises:
            TypeError, ValueError: gradients that do not fit their parameters.
            RuntimeError: in a CUDA graph, a rate that is no tensor, or a parameter that was never updated before.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update(None)
        return loss

    def step_clipped(self, max_norm: float) -> Tensor:
        """The same with gradients scaled by ``min(1, max_norm / (norm + 1e-6))``.

        Returns:
            The L2 norm of all gradients before that, float32 (float64), [], on their device.

        Raises:
            As :meth:`step`; ValueError also where ``max_norm`` is negative.
        """
        norm = self._update(max_norm)
        assert norm is not None
        return norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters, and those of their copies."""
        super().zero_grad(set_to_none)
        self._claim()
        for parameter in itertools.chain.from_iterable(group["params"] for group in self.param_groups):
            if (kept := half_copy(parameter)) is not None:
                kept.tensor.grad = None

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Take over moments, steps and hyperparameters of this optimizer or of ``torch.optim.AdamW``.

        A rate that is a tensor stays that tensor, with the value that is loaded: a CUDA graph may know its address.

        Raises:
            ValueError: groups of other sizes, or of an optimizer that does something else (``amsgrad``, ``maximize``).
        """
        for name in ("amsgrad", "maximize"):
            if any(group.get(name) for group in state_dict["param_groups"]):
                raise ValueError(f"a state with {name} does not fit ClippedAdamW, which has none")
        if not all(group.get("decoupled_weight_decay", True) for group in state_dict["param_groups"]):
            raise ValueError("a state of Adam, whose weight decay is part of the gradient, does not fit ClippedAdamW")
        rates = [group["lr"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, rate in zip(self.param_groups, rates, strict=True):
            group.update(_FIXED)
            if isinstance(rate, Tensor):
                rate.fill_(float(group["lr"]))
                group["lr"] = rate
            else:
                group["lr"] = float(group["lr"])
            for parameter in group["params"]:
                state = self.state.get(parameter)
                if state:
                    step = torch.as_tensor(state["step"], dtype=torch.float32)
                    state["step"] = step.to(parameter.device).reshape(())
                    for name in ("exp_avg", "exp_avg_sq"):
                        state[name] = torch.empty_like(parameter).copy_(state[name])

    def _claim(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if (kept := half_copy(parameter)) is not None:
                    kept.claim(self)

    @torch.no_grad()
    def _update(self, max_norm: float | None) -> Tensor | None:
        groups: list[AdamWGroup] = []
        written: list[tuple[Tensor, HalfCopy]] = []
        for group in self.param_groups:
            if not isinstance(group["lr"], Tensor) and _is_capturing(group["params"]):
                raise RuntimeError("a CUDA graph is being captured: lr must be a tensor, or no replay sees it change")
            entries: list[_Entry] = []
            for parameter in group["params"]:
                gradient = gradient_of(parameter)
                if gradient is None:
                    continue
                half, kept = None, half_copy(parameter)
                if kept is not None and kept.fits(parameter):
                    half = kept.tensor
                    written.append((parameter, kept))
                entries.append(_Entry(parameter, gradient, self._state_of(parameter), half))
            groups.append(_group(group, entries))
        norm = adamw(groups, max_norm=max_norm, tables=self._tables, backend=self._backend)
        for parameter, kept in written:
            kept.written(parameter)
        return norm

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            if _is_capturing([parameter]):
                raise RuntimeError("a CUDA graph is being captured, and a parameter has no moments: make a step first")
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        for name in ("exp_avg", "exp_avg_sq"):
            if not same_layout(state[name], parameter):  # someone gave the parameter other strides
                state[name] = torch.empty_like(parameter).copy_(state[name])
        return state


def _is_capturing(parameters: Sequence[Tensor]) -> bool:
    return bool(parameters) and parameters[0].is_cuda and torch.cuda.is_current_stream_capturing()


class _Entry(NamedTuple):
    """What is updated together."""

    parameter: Tensor
    gradient: Tensor
    state: dict[str, Tensor]
    half: Tensor | None


def _group(group: dict[str, Any], entries: Sequence[_Entry] = ()) -> AdamWGroup:
    return AdamWGroup(
        parameters=[entry.parameter for entry in entries],
        gradients=[entry.gradient for entry in entries],
        exp_avgs=[entry.state["exp_avg"] for entry in entries],
        exp_avg_sqs=[entry.state["exp_avg_sq"] for entry in entries],
        steps=[entry.state["step"] for entry in entries],
        halves=[entry.half for entry in entries],
        rate=group["lr"],
        betas=(float(group["betas"][0]), float(group["betas"][1])),
        epsilon=group["eps"],
        weight_decay=group["weight_decay"],
    )
