"""What may be added to the loss in training: how evenly the selected experts are used.

    with BHRoutingIntegration(model, alpha=0.05) as bh:
        out = model(**inputs, output_router_logits=True)
        balance = bh.load_balancing_loss(out.router_logits, inputs["attention_mask"])
        (loss_of(out) + 0.01 * balance).backward()

A decision itself has no gradient. This has one through the probabilities.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bhlib.weighting import probabilities


def load_balancing_loss(
    router_logits: Sequence[Tensor], experts: Sequence[Tensor], attention_mask: Tensor | None = None
) -> Tensor:
    """The load-balancing loss of transformers, for the experts that were selected.

    ``load_balancing_loss_func`` of transformers takes the k largest of a token's logits for what was selected. This is
    the same formula (Fedus, Zoph & Shazeer 2022, arXiv:2101.03961, equations 4 to 6) with the selection as it was; for
    static top-k with the model's own k it has the same value.

    Parameters
    ----------
    router_logits : sequence of Tensor [tokens, experts]
        By layer, in any float dtype: what a model gives under ``output_router_logits=True``.
    experts : sequence of Tensor [tokens, slots], int64
        By layer; what is not in ``0..experts - 1`` is an empty slot.
    attention_mask : Tensor [batch, length], optional
        0 for padding, which is left out. ``batch * length`` are the tokens, batch-major.

    Returns
    -------
    Tensor [], float32
        The number of experts times the sum over experts of the part of all tokens that selected it, times its mean
        probability, both over tokens and layers. That is the mean number of experts per token if all are used, and are
        probable, alike; more if those are used more that are more probable.

    Raises
    ------
    ValueError
        If there is no layer, or logits and experts are of different numbers of layers or tokens.
    """
    if not router_logits or [len(one) for one in router_logits] != [len(one) for one in experts]:
        raise ValueError(
            f"router_logits and experts must hold the same tokens of the same layers, and of one at least, got "
            f"{[len(one) for one in router_logits]} and {[len(one) for one in experts]} rows."
        )
    first = router_logits[0]
    device, num_experts = first.device, first.shape[-1]
    real = torch.ones(len(first), device=device) if attention_mask is None else attention_mask.reshape(-1).to(device)
    real = real.float()
    used = torch.zeros(num_experts + 1, device=device)  # the last for empty slots
    probable = torch.zeros(num_experts, device=device)
    for logits, selected in zip(router_logits, experts, strict=True):
        selected = selected.to(device)
        slots = torch.where((selected >= 0) & (selected < num_experts), selected, num_experts)
        used.scatter_add_(0, slots.flatten(), real.repeat_interleave(slots.shape[1]))
        probable = probable + real @ probabilities(logits.to(device)).float()
    rows = len(router_logits) * real.sum()
    return num_experts * (used[:-1] / rows * (probable / rows)).sum()
