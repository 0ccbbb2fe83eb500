"""The experts' forward pass by kernels: which of them suits a shape."""

import torch
from torch import Tensor, nn

from bhlib.kernels import on_device
from bhlib.kernels.grouped import grouped_forward
from bhlib.kernels.vector import vector_forward

#: Up to this many tokens, an expert is read by each token that selected it: two launches instead of four or five. On an
#: H100, with OLMoE's shapes, that is the faster way with half of the slots filled, and as fast with all of them.
VECTOR_TOKENS = 4

#: The same where kernels are launched one by one, and the device waits for the host more than for memory.
LAUNCHED_VECTOR_TOKENS = 16


#: What stands in for dropped experts, a `bhlib.compensation.LayerCompensation`: means, down and up.
Missing = tuple[Tensor, Tensor, Tensor]


def experts_forward(
    module: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    missing: Missing | None = None,
) -> Tensor:
    """Forward of an experts module over its filled slots, with static shapes and without waiting for the device.

    Parameters
    ----------
    module : nn.Module
        An experts module for which `bhlib.kernels.module_fits` and `inputs_fit` hold.
    hidden_states : Tensor [tokens, hidden]
    top_k_index : Tensor [tokens, slots], int64
        Anything outside ``0..num_experts - 1`` marks an empty slot.
    top_k_weights : Tensor [tokens, slots]
    missing : tuple of Tensor, optional
        What stands in for dropped experts, in the dtype of `hidden_states`, contiguous.

    Returns
    -------
    Tensor [tokens, hidden], in the dtype of `hidden_states`.
    """
    # An operator costs more to call than the kernels take for one token: it is for the compiler, which needs one.
    forward = _experts_operator if torch.compiler.is_compiling() else _experts
    matrices = module.gate_up_proj, module.down_proj
    return forward(hidden_states, *matrices, top_k_index, top_k_weights, *(missing or (None, None, None)))


def _experts(
    hidden_states: Tensor, gate_up_proj: Tensor, down_proj: Tensor, top_k_index: Tensor, top_k_weights: Tensor,
    means: Tensor | None, down: Tensor | None, up: Tensor | None,
) -> Tensor:  # fmt: skip
    launched = hidden_states.is_cuda and not torch.cuda.is_current_stream_capturing()
    most = LAUNCHED_VECTOR_TOKENS if launched else VECTOR_TOKENS
    return _forward(most, hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights, means, down, up)


def _compiled_experts(
    hidden_states: Tensor, gate_up_proj: Tensor, down_proj: Tensor, top_k_index: Tensor, top_k_weights: Tensor,
    means: Tensor | None, down: Tensor | None, up: Tensor | None,
) -> Tensor:  # fmt: skip
    return _forward(VECTOR_TOKENS, hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights, means, down, up)


def _forward(
    vector_tokens: int,
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    means: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
) -> Tensor:
    if top_k_index.numel() == 0:
        return torch.zeros_like(hidden_states)
    forward = vector_forward if len(hidden_states) <= vector_tokens else grouped_forward
    missing = None if means is None or down is None or up is None else (means, down, up)
    routing = top_k_index.contiguous(), top_k_weights.contiguous()
    with on_device(hidden_states.device):
        return forward(hidden_states.contiguous(), gate_up_proj, down_proj, *routing, missing=missing)


_experts_operator = torch.library.custom_op("bhlib::experts", _compiled_experts, mutates_args=())


@_experts_operator.register_fake
def _(hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights, means, down, up):
    return hidden_states.new_empty(hidden_states.shape)
