"""The experts' forward pass for training on a GPU: pairs sorted once, grouped products, cheap gradients.

transformers' ``grouped_mm`` gathers by indexing, whose gradient sorts again and adds up. Here the filled slots, pairs
of a token and an expert, are sorted once, and the gradient of a gather is again a gather, in which an empty slot reads
a row of zeros.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from bhlib.kernels import gradients_wanted

if TYPE_CHECKING:
    from bhlib.expert_loop import ExpertsModule

#: Where it computes, and in which precisions: those of ``torch.nn.functional.grouped_mm``.
DEVICES = ("cuda",)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def inputs_fit(implementation: str, module: "ExpertsModule", hidden_states: Tensor, top_k_weights: Tensor) -> bool:
    """Whether `sorted_forward` is for these inputs of a plain module: on a CUDA device, in training.

    That is where a gradient is wanted, and in training mode anyway, so that a pass that gradient checkpointing repeats
    has the same bits. It takes the place of ``grouped_mm`` alone, transformers' default there, and calls the same
    products: they heed autocast as little, and work where those do. Whoever trains by another implementation has chosen
    it.
    """
    if hidden_states.device.type not in DEVICES or implementation != "grouped_mm":
        return False
    gate_up, down = module.gate_up_proj, module.down_proj
    fit = hidden_states.dtype == gate_up.dtype == down.dtype and hidden_states.dtype in DTYPES
    return fit and (module.training or gradients_wanted(hidden_states, top_k_weights, gate_up, down))


def by_slot(rows: Tensor, place: Tensor) -> Tensor:
    """Rows of pairs [pairs, ...] by token and slot [tokens, slots, ...]; `place` is ``pairs`` for an empty slot."""
    padded = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])
    return padded.index_select(0, place.flatten()).view(*place.shape, *rows.shape[1:])


class Dispatch(torch.autograd.Function):
    """Rows of tokens [tokens, hidden] in the order of their pairs [pairs, hidden].

    `token` [pairs] is the token of each pair; `place` [tokens, slots] is as for `by_slot`.
    """

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, token: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return hidden_states.index_select(0, token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return by_slot(grad, *ctx.saved_tensors).sum(1), None, None


class Combine(torch.autograd.Function):
    """Weighted sum over a token's slots: [pairs, hidden], [tokens, slots] -> [tokens, hidden].

    `order` [pairs] is the slot of each pair, among those of all tokens.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, order, place)
        return (by_slot(rows, place) * weights.unsqueeze(-1)).sum(1, dtype=rows.dtype)  # whatever autocast would give

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, weights, order, place = ctx.saved_tensors
        grad = grad.index_select(0, order // weights.shape[1])
        grad_weights = by_slot((grad * rows).sum(-1), place)
        return grad * weights.flatten().index_select(0, order).unsqueeze(-1), grad_weights, None, None


@torch.compiler.disable  # how many pairs there are is known at run time only
def sorted_forward(
    module: "ExpertsModule", hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Forward of an experts module over its filled slots.

    Parameters
    ----------
    module, top_k_index, top_k_weights
        As for `bhlib.expert_loop.loop_forward`.
    hidden_states : Tensor [tokens, hidden]
        In the dtype of the module's matrices, one of `DTYPES`.

    Returns
    -------
    Tensor [tokens, hidden], in the dtype of `hidden_states`. The output of an expert is rounded when it is
    weighted; a token's are then added up in float32, with one rounding at the end. Neither the result nor the gradients
    vary from run to run.
    """
    flat = top_k_index.flatten()
    chosen, order = flat.short().sort(stable=True)  # short keys sort faster; the empty slots come last
    numbers = torch.arange(1, module.num_experts + 1, device=flat.device).short()
    ends = torch.searchsorted(chosen, numbers).int()  # pairs of the experts 0..e end at ends[e]
    pairs = ends[-1].item()  # here, and nowhere else, a device is waited for
    if not pairs:
        return no_pairs(module, hidden_states, top_k_weights)
    order = order[:pairs]
    place = torch.full_like(flat, pairs)
    place[order] = torch.arange(pairs, device=flat.device)
    place = place.view_as(top_k_index)

    rows = Dispatch.apply(hidden_states, order // top_k_index.shape[1], place)
    gated = module._apply_gate(grouped_mm(rows, module.gate_up_proj.mT, offs=ends))
    rows = grouped_mm(gated, module.down_proj.mT, offs=ends)
    return Combine.apply(rows, top_k_weights.to(rows.dtype), order, place)


def no_pairs(module: "ExpertsModule", hidden_states: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward where no slot is filled: zeros, whose gradients are zeros and not missing.

    DistributedDataParallel takes a parameter without a gradient for an error.
    """
    total = torch.zeros_like(hidden_states)
    if torch.is_grad_enabled():
        for unused in (hidden_states, top_k_weights, *module.parameters()):
            if unused.requires_grad:
                total = total + unused.flatten()[:0].sum()
    return total.to(hidden_states.dtype)
