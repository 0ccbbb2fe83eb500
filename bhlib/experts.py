"""The experts' forward pass over the selected (token, expert) pairs only.

transformers gives every token the same number of slots, so an expert that a rule drops still costs a row of every
matrix product, whatever weight it has. Here the filled slots are gathered into a list of pairs, each pair is
handed to the model's own experts implementation as a token with a single slot, and the results are summed back
per token. The model's code computes; this module only decides which rows it sees. Hence dropped experts cost
nothing in *every* implementation, and with no slot empty the result has the same bits as without the patch.

Each implementation ``name`` gets a twin ``bh_name`` in transformers' `ExpertsInterface`. Because `generate()` looks
for the literal name ``grouped_mm`` to swap it in decoding, a twin is never swapped.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

PREFIX = "bh_"


def twin(implementation: str | None) -> str:
    """Name of the pair-wise twin of an experts implementation, registered on first use.

    Parameters
    ----------
    implementation : str or None
        A name known to transformers' `ExpertsInterface`, ``"eager"``, or None, which transformers reads as eager.
    """
    if implementation is not None and implementation.startswith(PREFIX):
        raise ValueError(f"{implementation!r} is a twin already: the model is patched.")
    name = PREFIX + (implementation or "eager")
    if name not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(name, partial(pairwise_forward, implementation or "eager"))
    return name


def original_forward(module: nn.Module, implementation: str) -> Callable[..., Tensor]:
    """The model's own forward of an experts module under an implementation's name."""
    # `use_experts_implementation` wraps the class's eager forward with functools.wraps.
    eager = type(module).forward.__wrapped__
    return ALL_EXPERTS_FUNCTIONS.get_interface(implementation, eager)


def pairwise_forward(
    implementation: str,
    module: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Forward of an experts module over its filled slots.

    Parameters
    ----------
    implementation : str
        Which of the model's own implementations multiplies the matrices.
    module : nn.Module
        The experts module: `num_experts` and the stacked weights.
    hidden_states : Tensor [tokens, hidden]
    top_k_index : Tensor [tokens, slots], int64
        Expert of each slot; `num_experts` marks an empty one.
    top_k_weights : Tensor [tokens, slots]

    Returns
    -------
    Tensor [tokens, hidden], in the dtype of `hidden_states`.
    """
    forward = original_forward(module, implementation)
    filled = top_k_index < module.num_experts
    if implementation == "eager":
        # The eager loop visits an expert's rows by slot, then token, and adds up a token's experts in the order of
        # their indices. To round as it does, list the pairs and place their outputs in the same orders.
        slot, token = torch.nonzero(filled.T, as_tuple=True)
        column = torch.argsort(torch.argsort(top_k_index, dim=-1, stable=True), dim=-1)[token, slot]
    else:
        token, slot = torch.nonzero(filled, as_tuple=True)
        column = slot
    weights = top_k_weights[token, slot, None]
    if len(token):
        # Weight 1 for every pair, and the weights here: so the products round as in the model, also where the
        # weights are wider than the hidden states.
        pairs = forward(module, hidden_states[token], top_k_index[token, slot, None], torch.ones_like(weights))
    else:
        pairs = hidden_states[token]
    weighted = pairs * weights
    if implementation == "eager":
        weighted = weighted.to(hidden_states.dtype)
    slots = weighted.new_zeros(*top_k_index.shape, hidden_states.shape[-1])
    slots = slots.index_put((token, column), weighted)
    if implementation != "eager":
        return slots.sum(dim=1).to(hidden_states.dtype)
    total = torch.zeros_like(hidden_states)
    for addend in slots.unbind(dim=1):
        total = total + addend
    return total
