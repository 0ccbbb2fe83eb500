"""Routing outside any model: logits of any leading shape in, weights with a column per expert out."""

from collections.abc import Iterable
from typing import Any

import pandas as pd
from torch import Tensor

from bhlib.pvalues import PValueMaker, check_logits, check_temperature, make_pvalues
from bhlib.rules.base import Level, Rule, TopK
from bhlib.rules.bh import BH


def benjamini_hochberg_routing(
    router_logits: Tensor,
    alpha: Level = 0.05,
    temperature: float = 1.0,
    min_k: int = 1,
    max_k: int = 8,
    *,
    pvalues: PValueMaker | str = "dirichlet",
    method: str = "bh",
    layer: int | None = None,
    return_stats: bool = False,
) -> tuple[Any, ...]:
    """Route tokens by the Benjamini–Hochberg procedure, outside any model.

    Parameters
    ----------
    router_logits : Tensor [tokens, experts] or [batch, sequence, experts]
        Raw logits, any float dtype. Decisions are made in float32 or wider.
    alpha : float or sequence of float
        Level of the procedure, in (0, 1); or one for each sequence of the batch.
    temperature : float
        Divides the logits in the softmax that the weights are read from, > 0. It changes the weights, not the
        selection (except with ``pvalues="softmax"``, whose p-values are read from that softmax).
    min_k, max_k : int
        Bounds on the number of experts per token.
    pvalues : PValueMaker or str
        Where the p-values come from (`bhlib.pvalues`); ``"dirichlet"`` needs no calibration.
    method : str
        Multiple-testing procedure (`bhlib.procedures`).
    layer : int, optional
        MoE layer that the logits come from; needed by p-values calibrated per layer.
    return_stats : bool
        Whether to return `stats` too.

    Returns
    -------
    weights : Tensor [..., experts], float32 or wider
        Non-negative, zero for experts that were not selected; sums to 1 (to 0 where nothing was selected).
    experts : Tensor [..., max_k], int64
        Selected experts, largest weight first (smallest p-value first where p-values differ by expert); -1 pads.
    counts : Tensor [...], int64
        Number of experts selected.
    stats : dict, only with `return_stats`
        ``total_tokens``; ``mean_``, ``std_``, ``min_`` and ``max_experts_per_token``; ``sparsity_gain``, the fraction
        of `max_k` experts per token that was saved; ``share_at_min_k`` and ``share_at_max_k``, the fractions of tokens
        with exactly that many; and ``alpha``, ``temperature``, ``min_k``, ``max_k`` as given. For no tokens, NaN,
        and None for the smallest and the largest.

    Examples
    --------
    >>> import torch
    >>> logits = torch.cat([torch.full((1, 3), 9.0), torch.linspace(-1, 1, 61)[None]], dim=1)
    >>> weights, experts, counts = benjamini_hochberg_routing(logits, alpha=0.05)
    >>> int(counts[0]), sorted(experts[0, :3].tolist())
    (3, [0, 1, 2])
    """
    check_temperature(temperature)
    rule = BH(alpha=alpha, pvalues=make_pvalues(pvalues, temperature), method=method, min_k=min_k, max_k=max_k)
    weights, experts, counts = _dense(rule, router_logits, temperature, layer)
    if not return_stats:
        return weights, experts, counts
    settings = {"alpha": rule.alpha, "temperature": float(temperature), "min_k": rule.min_k, "max_k": rule.max_k}
    return weights, experts, counts, settings | _stats_of_counts(counts, rule)


def compare_max_k(router_logits: Tensor, max_ks: Iterable[int] = (2, 4, 8, 16), **options) -> pd.DataFrame:
    """What an upper bound on the number of experts does: `benjamini_hochberg_routing` at each of several `max_k`.

    Parameters
    ----------
    router_logits : Tensor [tokens, experts] or [batch, sequence, experts]
    max_ks : iterable of int
    **options
        Of `benjamini_hochberg_routing`: alpha, min_k, pvalues and so on.

    Returns
    -------
    DataFrame
        The statistics of the routing function, a row for each `max_k`. The procedure is the same in each row, so
        ``share_at_max_k`` tells how often the bound binds (or is met exactly).
    """
    stats = [benjamini_hochberg_routing(router_logits, max_k=k, return_stats=True, **options)[3] for k in max_ks]
    return pd.DataFrame(stats).set_index("max_k")


def _stats_of_counts(counts: Tensor, rule: Rule) -> dict:
    counts = counts.flatten().double()
    mean = counts.mean().item()
    return {
        "total_tokens": len(counts),
        "mean_experts_per_token": mean,
        "std_experts_per_token": (counts - mean).square().mean().sqrt().item(),
        "min_experts_per_token": int(counts.min()) if len(counts) else None,
        "max_experts_per_token": int(counts.max()) if len(counts) else None,
        "sparsity_gain": 1 - mean / rule.max_k,
        "share_at_min_k": (counts == rule.min_k).double().mean().item(),
        "share_at_max_k": (counts == rule.max_k).double().mean().item(),
    }


def topk_routing(router_logits: Tensor, k: int = 8, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Static top-k with the same returns as `benjamini_hochberg_routing`: the baseline."""
    check_temperature(temperature)
    return _dense(TopK(k), router_logits, temperature, None)


def _dense(rule: Rule, router_logits: Tensor, temperature: float, layer: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Apply a rule to logits of any leading shape; weights scattered to one column per expert."""
    check_logits(router_logits)
    lead, num_experts = router_logits.shape[:-1], router_logits.shape[-1]
    weights, experts, counts = rule(
        router_logits.reshape(-1, num_experts), layer, weighting="normalized", temperature=temperature
    )
    dense = weights.new_zeros(len(weights), num_experts)
    # Empty slots add their weight 0 to expert 0.
    dense.scatter_add_(-1, experts.clamp(min=0), weights)
    # Not view(*lead, -1): without tokens the number of slots would be undetermined.
    return dense.view(router_logits.shape), experts.view(*lead, experts.shape[-1]), counts.view(lead)
