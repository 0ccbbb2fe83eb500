"""The experts' forward for training: sorted pairs and grouped matrix products, with cheap gradients.

transformers' own `grouped_mm` gathers tokens by indexing, whose gradient is a slow scatter with accumulation.
The pairs (token, slot) are a permutation, so the gradient of a gather is a gather by the inverse permutation.
"""

import torch
import torch.nn.functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

IMPLEMENTATION = "sorted_pairs"


class Dispatch(torch.autograd.Function):
    """Rows of [tokens, hidden] in the order of their pairs: [pairs, hidden]."""

    @staticmethod
    def forward(ctx, hidden_states, order, inverse, top_k):
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return hidden_states.index_select(0, order // top_k)

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse).view(-1, ctx.top_k, grad.shape[-1]).sum(1), None, None, None


class Combine(torch.autograd.Function):
    """Weighted sum over a token's slots: [pairs, hidden], [tokens, slots] -> [tokens, hidden]."""

    @staticmethod
    def forward(ctx, rows, weights, order, inverse):
        ctx.save_for_backward(rows, weights, order, inverse)
        rows = rows.index_select(0, inverse).view(*weights.shape, -1)
        return (rows * weights.unsqueeze(-1)).sum(1)

    @staticmethod
    def backward(ctx, grad):
        rows, weights, order, inverse = ctx.saved_tensors
        grad = grad.index_select(0, order // weights.shape[1])
        grad_weights = (grad * rows).sum(-1).index_select(0, inverse).view_as(weights)
        return grad * weights.flatten().index_select(0, order).unsqueeze(-1), grad_weights, None, None


def sorted_pairs_forward(self, hidden_states, top_k_index, top_k_weights):
    """Weighted sum of the chosen experts' outputs, [tokens, hidden]; equals transformers' eager experts."""
    experts, order = top_k_index.flatten().short().sort(stable=True)  # short keys: fewer radix passes
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    bounds = torch.arange(1, self.num_experts + 1, device=experts.device).short()
    ends = torch.searchsorted(experts, bounds).int()  # pairs of the experts 0..e end at ends[e]

    rows = Dispatch.apply(hidden_states, order, inverse, top_k_index.shape[-1])
    gate, up = F.grouped_mm(rows, self.gate_up_proj.mT, offs=ends).chunk(2, -1)
    rows = F.grouped_mm(self.act_fn(gate) * up, self.down_proj.mT, offs=ends)
    return Combine.apply(rows, top_k_weights.to(rows.dtype), order, inverse)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, sorted_pairs_forward)
