"""What a rule's decision is made of, and how a decision tells the experts which of the model's own were dropped."""

from typing import NamedTuple

import torch
from torch import Tensor

from bhlib.weighting import find_weighting


class Routing(NamedTuple):
    """What a rule decided: one row per token, one column per slot.

    Attributes
    ----------
    weights : Tensor [tokens, slots], float32
        Weight of each selected expert, 0 in an empty slot.
    experts : Tensor [tokens, slots], int64
        Index of each selected expert, -1 in an empty slot. Selected experts fill a row from the left.
    counts : Tensor [tokens], int64
        Number of experts selected for the token.
    """

    weights: Tensor
    experts: Tensor
    counts: Tensor


class Forms(NamedTuple):
    """A routing as a model's experts take it, and as it is recorded.

    Attributes
    ----------
    weights : Tensor [tokens, slots]
        In the dtype of the model; 0 in an empty slot.
    experts : Tensor [tokens, slots], int64
        The number of experts in an empty slot.
    counts : Tensor [tokens], int64
    exact : Tensor [tokens, slots], or None
        The weights in float32 or wider; None if not asked for.
    """

    weights: Tensor
    experts: Tensor
    counts: Tensor
    exact: Tensor | None


def mark_dropped(
    experts: Tensor,
    router_logits: Tensor,
    own_k: int,
    *,
    weighting: str,
    temperature: float,
    is_prefix: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """A decision in the slots of the model's own top-k, of which those that were dropped are marked.

    A dropped expert e stands in its slot as the number ``num_experts + 1 + e``, with its weight. Whoever multiplies
    matrices takes such a slot for an empty one.

    Parameters
    ----------
    experts : Tensor [tokens, slots]
        What a rule has selected on these logits; the number of experts in an empty slot.
    router_logits : Tensor [tokens, experts]
    own_k : int
        Experts per token of the model's own routing.
    weighting, temperature
        As the rule was called with.
    is_prefix : bool
        Whether the rule keeps experts of the model's own top-k only.

    Returns
    -------
    weights, experts : Tensor [tokens, slots]
        `own_k` slots, and, unless `is_prefix`, those of the rule for experts that are not among the model's own. The
        weights are the model's: where its convention divides by a sum, by that of its own top-k, whatever was dropped
        or is beside it, so that what is kept and what stands in fit together.
    exact : Tensor [tokens, slots]
        The weights of what was kept, 0 elsewhere.
    """
    convention, num_experts = find_weighting(weighting), router_logits.shape[-1]
    scores = convention.scores(router_logits, temperature)
    top, own = scores.topk(own_k, dim=-1)
    marked = convention.weights(top, torch.ones_like(own, dtype=torch.bool))
    same = own[:, :, None] == experts[:, None, :]
    kept = same.any(dim=2)
    index = torch.where(kept, own, own + (num_experts + 1))
    exact = marked * kept
    if not is_prefix:
        others = ~same.any(dim=1) & (experts < num_experts)
        index = torch.cat([index, torch.where(others, experts, num_experts)], dim=1)
        beside = convention.beside(top, scores.gather(-1, experts.clamp(max=num_experts - 1))) * others
        marked, exact = torch.cat([marked, beside], dim=1), torch.cat([exact, beside], dim=1)
    return marked, index, exact
