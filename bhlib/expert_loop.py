"""The experts' forward pass on a CPU: one expert after the other, in plain torch.

Experts are taken by parts: as many at a time as stays in the processor's cache. The implementations of transformers
write buffers of all pairs instead, and large ones to memory that the system has to hand out anew each time: that takes
twice as long. Few tokens cost calls rather than arithmetic: there are none here for experts that nobody selected.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

#: Gathered hidden states of a part, in bytes. Half or twice as many make no difference on the demo's layers.
PART_BYTES = 2**20

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


def token_forward(module: "ExpertsModule", hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """`loop_forward` of one token with a filled slot: nothing to sort. Experts are added up in the order of slots."""
    slots = top_k_index[0].tolist()
    experts = [expert for expert in slots if expert < module.num_experts]
    if experts != slots[: len(experts)]:  # an empty slot before a filled one, which no rule leaves
        return loop_forward(module, hidden_states, top_k_index, top_k_weights)
    gate_up, down = _matrices(module)
    gated = module._apply_gate(torch.cat([linear(hidden_states, gate_up[expert]) for expert in experts]))
    outputs = torch.cat([linear(row, down[expert]) for row, expert in zip(gated.split(1), experts, strict=True)])
    wide = _wide(hidden_states)
    total = torch.mv(outputs.to(wide).T, top_k_weights[0, : len(experts)].to(wide))
    return total.unsqueeze(0).to(hidden_states.dtype)


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
    flat = top_k_index.flatten()
    order = torch.argsort(flat, stable=True)
    per_expert = torch.bincount(flat, minlength=module.num_experts + 1).tolist()[: module.num_experts]
    token, weights = order // top_k_index.shape[1], top_k_weights.flatten()[order].unsqueeze(-1)
    matrices, wide = _matrices(module), _wide(hidden_states)
    total = torch.zeros(hidden_states.shape, dtype=wide, device=hidden_states.device)
    most_rows = PART_BYTES // (hidden_states.shape[1] * hidden_states.element_size())
    first = 0
    for experts, sizes in _parts(per_expert, most_rows):
        part = slice(first, first := first + sum(sizes))
        rows = hidden_states.index_select(0, token[part])
        outputs = _weighted_outputs(module, matrices, rows, weights[part], experts, sizes)
        total.index_add_(0, token[part], outputs.to(wide))
    return total.to(hidden_states.dtype)


def _parts(per_expert: Sequence[int], most_rows: int) -> Iterator[tuple[list[int], list[int]]]:
    """Experts that were selected and how often, by parts of at most so many rows, or of one expert."""
    experts: list[int] = []
    sizes: list[int] = []
    for expert, size in enumerate(per_expert):
        if experts and sum(sizes) + size > most_rows:
            yield experts, sizes
            experts, sizes = [], []
        if size:
            experts.append(expert)
            sizes.append(size)
    if experts:
        yield experts, sizes


def _matrices(module: "ExpertsModule") -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The experts' two matrices by expert: taken out one by one, each would have a gradient of the size of all."""
    matrices = module.gate_up_proj, module.down_proj
    if not torch.is_grad_enabled():
        return matrices  # type: ignore[return-value]  # a tensor is not a Sequence, but is indexed like one
    return matrices[0].unbind(), matrices[1].unbind()


def _weighted_outputs(
    module: "ExpertsModule",
    matrices: tuple[Sequence[Tensor], Sequence[Tensor]],
    rows: Tensor,
    weights: Tensor,
    experts: Sequence[int],
    sizes: Sequence[int],
) -> Tensor:
    """What experts make of rows, of which each has its `sizes`, one expert's after the other's; times `weights`."""
    gate_up, down = matrices
    products = [linear(part, gate_up[e]) for part, e in zip(rows.split(sizes), experts, strict=True)]
    # Weighted before the second product, where rows are shorter in most models.
    gated = (module._apply_gate(torch.cat(products)) * weights).to(rows.dtype)
    return torch.cat([linear(part, down[e]) for part, e in zip(gated.split(sizes), experts, strict=True)])


def _wide(hidden_states: Tensor) -> torch.dtype:
    return torch.promote_types(hidden_states.dtype, torch.float32)
