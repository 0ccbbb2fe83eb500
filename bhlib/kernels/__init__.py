"""Kernels, by Triton for CUDA devices: routing in one launch, and the experts over the selected pairs alone.

    from bhlib import kernels
    if kernels.available():
        from bhlib.kernels.routing import bh_route  # logits -> weights, experts, counts
        from bhlib.kernels.forward import experts_forward  # the experts' forward pass over the filled slots

Everything here has a twin in plain torch that says what is computed (`bhlib.rules.BH`, `bhlib.experts`), and is
tested against it. Shapes depend on the number of tokens and slots alone, never on how many slots are filled, and
nothing waits for the device: hence CUDA graphs and ``torch.compile`` hold while the counts change from token to token.
Nothing is added up by atomic operations, so the same inputs give the same bits.

On a CPU there is `bhlib.kernels.loop`, in plain torch: the experts alone, on as many pairs as there are.

Importing this package is free; its other modules import Triton, which is there where torch was installed for CUDA on
Linux. With ``TRITON_INTERPRET=1`` in the environment these run on the CPU, slowly: that is how they are tested without
a GPU.
"""

import functools
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["available", "installed", "interpreted", "on_device", "run_on"]

#: What the kernels are compiled for: bfloat16 products came with Ampere.
OLDEST_CAPABILITY = (8, 0)


@functools.cache
def installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, in its interpreter (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def available() -> bool:
    """Whether the kernels can run here: Triton is there, with CUDA devices that are new enough or its interpreter."""
    if not installed():
        return False
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    fits = [torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY for device in devices]
    return interpreted() or (bool(fits) and all(fits))


def run_on(device: torch.device) -> bool:
    """Whether the kernels run on tensors of a device."""
    return (device.type == "cuda" or interpreted()) and available()


def on_device(device: torch.device) -> AbstractContextManager:
    """Within the block kernels start on a device: Triton starts them on the current one, whatever their tensors."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
