"""The experts' forward for training under a rule: `expert_training.py`, over the filled slots only.

A slot with the index ``num_experts`` is empty. The gradient of a gather is again a gather, in which an empty slot reads
a row of zeros.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from bhlib import experts

IMPLEMENTATION = "filled_slots"


def by_slot(rows: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Rows of pairs [pairs, ...] by token and slot [tokens, slots, ...]; `place` is ``pairs`` for an empty slot."""
    padded = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])
    return padded.index_select(0, place.flatten()).view(*place.shape, *rows.shape[1:])


class Dispatch(torch.autograd.Function):
    """Rows of [tokens, hidden] in the order of their pairs: [pairs, hidden]."""

    @staticmethod
    def forward(ctx, hidden_states, token, place):
        ctx.save_for_backward(place)
        return hidden_states.index_select(0, token)

    @staticmethod
    def backward(ctx, grad):
        return by_slot(grad, *ctx.saved_tensors).sum(1), None, None


class Combine(torch.autograd.Function):
    """Weighted sum over a token's slots: [pairs, hidden], [tokens, slots] -> [tokens, hidden]."""

    @staticmethod
    def forward(ctx, rows, weights, order, place):
        ctx.save_for_backward(rows, weights, order, place)
        return (by_slot(rows, place) * weights.unsqueeze(-1)).sum(1)

    @staticmethod
    def backward(ctx, grad):
        rows, weights, order, place = ctx.saved_tensors
        grad = grad.index_select(0, order // weights.shape[1])
        grad_weights = by_slot((grad * rows).sum(-1), place)
        return grad * weights.flatten().index_select(0, order).unsqueeze(-1), grad_weights, None, None


def filled_slots_forward(self, hidden_states, top_k_index, top_k_weights):
    """Weighted sum of the chosen experts' outputs, [tokens, hidden]."""
    flat = top_k_index.flatten()
    chosen, order = flat.short().sort(stable=True)  # the empty slots come last
    bounds = torch.arange(1, self.num_experts + 1, device=flat.device).short()
    ends = torch.searchsorted(chosen, bounds).int()  # pairs of the experts 0..e end at ends[e]
    pairs = int(ends[-1])
    order = order[:pairs]
    place = torch.full_like(flat, pairs)
    place[order] = torch.arange(pairs, device=flat.device)
    place = place.view_as(top_k_index)

    rows = Dispatch.apply(hidden_states, order // top_k_index.shape[1], place)
    gate, up = F.grouped_mm(rows, self.gate_up_proj.mT, offs=ends).chunk(2, -1)
    rows = F.grouped_mm(self.act_fn(gate) * up, self.down_proj.mT, offs=ends)
    return Combine.apply(rows, top_k_weights.to(rows.dtype), order, place)


def use_filled_slots(model: nn.Module) -> None:
    """Let a model compute its experts so, patched or not."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, filled_slots_forward)
    if IMPLEMENTATION not in experts.SKIPPING:
        experts.SKIPPING = (*experts.SKIPPING, IMPLEMENTATION)
    model.set_experts_implementation(IMPLEMENTATION)
