"""The experts' forward pass on a CPU: one expert after the other, in plain torch.

What one expert makes stays in the processor's cache. The implementations of transformers write buffers of all pairs
instead, and large ones to memory that the system has to hand out anew each time: that takes twice as long.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:

    class ExpertsModule(nn.Module):
        """For type checkers: what an experts module has that transformers' `use_experts_implementation` decorates."""

        num_experts: int
        has_gate: bool
        has_bias: bool
        is_transposed: bool
        gate_up_proj: Tensor
        down_proj: Tensor
        config: Any

        def _apply_gate(self, gate_up: Tensor) -> Tensor: ...


def is_plain(module: "ExpertsModule") -> bool:
    """Whether an experts module is a gate and two matrices per expert: no biases, no norms, weights in rows."""
    return (
        module.has_gate
        and not module.has_bias
        and not module.is_transposed
        and getattr(module, "is_concatenated", True)
        and not getattr(module, "has_post_expert_norm", False)
        # no shards, no quantized weights
        and all(type(matrices) in (Tensor, nn.Parameter) for matrices in (module.gate_up_proj, module.down_proj))
    )


def loop_forward(module: "ExpertsModule", hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Forward of an experts module over its filled slots.

    Parameters
    ----------
    module : nn.Module
        An experts module for which `is_plain` holds.
    hidden_states : Tensor [tokens, hidden]
    top_k_index : Tensor [tokens, slots], int64
        Expert of each slot; `num_experts` marks an empty one.
    top_k_weights : Tensor [tokens, slots]

    Returns
    -------
    Tensor [tokens, hidden], in the dtype of `hidden_states`. A token's experts are added up in float32 or wider, in
    the order of their numbers.
    """
    token, slot = torch.nonzero(top_k_index < module.num_experts, as_tuple=True)
    expert = top_k_index[token, slot]
    order = torch.argsort(expert, stable=True)
    per_expert = torch.bincount(expert, minlength=module.num_experts).tolist()
    tokens_of, weights_of = token[order].split(per_expert), top_k_weights[token, slot][order].split(per_expert)
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    total = torch.zeros(hidden_states.shape, dtype=wide, device=hidden_states.device)
    matrices = zip(module.gate_up_proj.unbind(), module.down_proj.unbind(), strict=True)
    for (gate_up, down), tokens, weights in zip(matrices, tokens_of, weights_of, strict=True):
        if len(tokens):
            gated = module._apply_gate(nn.functional.linear(hidden_states.index_select(0, tokens), gate_up))
            outputs = nn.functional.linear(gated, down)
            total.index_add_(0, tokens, (outputs * weights.unsqueeze(-1)).to(wide))
    return total.to(hidden_states.dtype)
