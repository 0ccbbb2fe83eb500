"""The experts' forward pass for training on a GPU: pairs sorted by expert, grouped products, cheap gradients.

transformers' ``grouped_mm`` gathers and scatters by indexing, whose gradient adds up by sorting. Here the filled slots,
pairs of a token and an expert, are counted and sorted once; what is a gather in one direction is then, for each token,
the sum of a few rows in the other.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag, grouped_mm

if TYPE_CHECKING:
    from bhlib.expert_loop import ExpertsModule


class Gather(torch.autograd.Function):
    """Rows of tokens [tokens, hidden] in the order of their pairs [pairs, hidden].

    `token` [pairs] is the token of each pair. `places` [pairs] are those of the first token's pairs among all, then
    those of the second token's, and so on; `first` [tokens] is where in `places` each token begins.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, token: Tensor, places: Tensor, first: Tensor) -> Tensor:
        ctx.save_for_backward(places, first)
        return rows.index_select(0, token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _add_up(grad, *ctx.saved_tensors), None, None, None


class AddUp(torch.autograd.Function):
    """The sum of each token's pairs: [pairs, hidden] -> [tokens, hidden]. The transpose of `Gather`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, token: Tensor, places: Tensor, first: Tensor) -> Tensor:
        ctx.save_for_backward(token)
        return _add_up(rows, places, first)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (token,) = ctx.saved_tensors
        return grad.index_select(0, token), None, None, None


def _add_up(rows: Tensor, places: Tensor, first: Tensor) -> Tensor:
    # In float32 whatever the dtype, with one rounding at the end; a token without pairs gets zeros.
    return embedding_bag(places, rows, first, mode="sum")


def inputs_fit(module: "ExpertsModule", hidden_states: Tensor) -> bool:
    """Whether `sorted_forward` is for these inputs of a plain module: bfloat16, on a CUDA device."""
    dtypes = {hidden_states.dtype, module.gate_up_proj.dtype, module.down_proj.dtype}
    return hidden_states.is_cuda and dtypes == {torch.bfloat16}


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
        In the dtype of the module's matrices, one that ``torch.nn.functional.grouped_mm`` takes.

    Returns
    -------
    Tensor [tokens, hidden], in the dtype of `hidden_states`. A token's experts are added up in float32, in the order of
    their slots. Neither they nor the gradients of the hidden states vary from run to run.
    """
    filled = top_k_index < module.num_experts
    slot = filled.flatten().nonzero()[:, 0]  # token by token; here, and nowhere else, a device is waited for
    if not len(slot):
        return no_pairs(module, hidden_states, top_k_weights)
    expert, order = top_k_index.flatten()[slot].short().sort(stable=True)  # short keys sort faster
    slot, places = slot[order], torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    per_token = filled.sum(dim=1)
    pairs = slot // top_k_index.shape[1], places, per_token.cumsum(dim=0) - per_token
    numbers = torch.arange(1, module.num_experts + 1, dtype=torch.int16, device=order.device)
    ends = torch.searchsorted(expert, numbers).int()  # pairs of the experts up to each

    rows = Gather.apply(hidden_states, *pairs)
    weights = top_k_weights.flatten().index_select(0, slot).unsqueeze(-1)
    gate_up = grouped_mm(rows, module.gate_up_proj.mT, offs=ends)
    # Weighted before the second product, where rows are shorter in most models.
    gated = (module._apply_gate(gate_up) * weights).to(rows.dtype)
    return AddUp.apply(grouped_mm(gated, module.down_proj.mT, offs=ends), *pairs)


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
