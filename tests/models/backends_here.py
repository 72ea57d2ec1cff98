"""Which attention backends the network tests can run on a device of this machine."""

from __future__ import annotations

import torch

from fastmetro_kernels import backends


def available(device: torch.device) -> list[str]:
    """Names for `create_model(attention=...)`; the interpreter counts as Triton on the CPU."""
    names = ["dense", "reference"]
    names += [] if backends.native_reasons("attention_forward_native", device) else ["native"]
    names += [] if backends.triton_reasons(device) else ["triton"]
    return names
