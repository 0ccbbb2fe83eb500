"""Kernels, by Triton for CUDA devices: routing in one launch, and the experts over the selected pairs alone.

    from bhlib import kernels
    if kernels.available():
        from bhlib.kernels.routing import bh_route  # logits -> weights, experts, counts
        from bhlib.kernels.forward import experts_forward  # the experts' forward pass over the filled slots

Everything here has a twin in plain torch that says what is computed (`bhlib.rules.BH`, `bhlib.experts`), and is
tested against it. Shapes depend on the number of tokens and slots alone, never on how many slots are filled, and
nothing waits for the device: hence CUDA graphs and ``torch.compile`` hold while the counts change from token to token.
Nothing is added up by atomic operations, so the same inputs give the same bits.

Whether they can compute something here is asked of this module: of the machine by `available`, of a module by
`module_fits`, of its inputs by `inputs_fit`. On a CPU there is `bhlib.expert_loop`, for training `bhlib.sorted_pairs`,
both in plain torch.

Importing this package is free; its other modules import Triton, which is there where torch was installed for CUDA on
Linux. With ``TRITON_INTERPRET=1`` in the environment these run on the CPU, slowly: that is how they are tested without
a GPU.
"""

import functools
import importlib.util
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from bhlib.expert_loop import is_plain

__all__ = [
    "available",
    "demand",
    "gradients_wanted",
    "inputs_fit",
    "installed",
    "interpreted",
    "module_fits",
    "on_device",
    "run_on",
    "weights_fit",
]

#: What the kernels are compiled for: bfloat16 products came with Ampere.
OLDEST_CAPABILITY = (8, 0)

#: Experts of a layer that the kernels can tell apart: a byte holds the number of one.
MOST_EXPERTS = 256

DTYPES = (torch.bfloat16, torch.float16)


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


def module_fits(module: nn.Module) -> bool:
    """Whether an experts module is of the kind that the kernels compute, wherever its weights are now.

    That is: SiLU-gated experts without biases, whose weights lie in rows (OLMoE, Qwen3-MoE, Mixtral).
    """
    # Imported late: an old transformers, which is refused with an error of its own, has no such module.
    from transformers.activations import ACT2FN
    from transformers.integrations import moe

    return (
        is_plain(module)
        and type(module)._apply_gate is moe._default_apply_gate
        and type(module.act_fn) in (nn.SiLU, type(ACT2FN["silu"]))
        and module.num_experts <= MOST_EXPERTS
        and all(
            matrices.is_contiguous() and matrices.shape[2] % 8 == 0  # rows start at multiples of 16 bytes
            for matrices in (module.gate_up_proj, module.down_proj)
        )
    )


def weights_fit(module: nn.Module) -> bool:
    """Whether the weights of a module that fits are where, and in a precision in which, the kernels compute."""
    return run_on(module.gate_up_proj.device) and module.gate_up_proj.dtype == module.down_proj.dtype in DTYPES


def inputs_fit(module: nn.Module, hidden_states: Tensor, top_k_weights: Tensor) -> bool:
    """Whether the kernels compute a module that fits on these inputs.

    That is: in half precision on a CUDA device, with no gradient wanted and not in training mode, in which a pass that
    gradient checkpointing repeats may begin without gradients. Asked in every forward pass, so it asks nothing that
    ``torch.compile`` cannot see.
    """
    if hidden_states.dtype not in DTYPES or not (hidden_states.is_cuda or interpreted()):
        return False
    gate_up, down = module.gate_up_proj, module.down_proj
    fit = gate_up.dtype == down.dtype == hidden_states.dtype
    return fit and not (module.training or gradients_wanted(hidden_states, top_k_weights, gate_up, down))


def gradients_wanted(*inputs: Tensor) -> bool:
    """Whether autograd records what is made of these tensors: then kernels, which have no backward, stay away."""
    return torch.is_grad_enabled() and any(one.requires_grad for one in inputs)


def demand(experts: Mapping[str, nn.Module]) -> None:
    """Raise unless the kernels can compute experts modules on this machine; each comes under its router's name."""
    if not available():
        raise RuntimeError(
            "kernels=True needs Triton and a CUDA device of compute capability 8.0 or newer: install torch for "
            "CUDA, or leave kernels='auto'."
        )
    unfit = [name for name, module in experts.items() if not module_fits(module)]
    if unfit:
        raise ValueError(
            f"kernels=True is not possible: the experts beside {unfit[0]!r} are not SiLU-gated matrices without "
            f"biases in one piece. Leave kernels='auto' to use the model's own implementation."
        )


def on_device(device: torch.device) -> AbstractContextManager:
    """Within the block kernels start on a device: Triton starts them on the current one, whatever their tensors."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
