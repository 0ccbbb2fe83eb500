"""Why a token gets the experts that it gets: one row per expert, with all that the rule looked at.

    explain(BH(0.05), router_logits[layer, token], layer)

The table agrees with the rule's own decision for every rule, since it asks the rule itself, once as it is and once
without bounds; the p-values and thresholds beside it are those of `bhlib.pvalues` and `bhlib.procedures`. For a token
that a patched model has just routed, see `bhlib.RoutingPatch.explain`.
"""

import copy
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from bhlib.procedures import critical_values
from bhlib.pvalues import check_logits
from bhlib.rules import BH, Replay, Routing, Rule, Threshold
from bhlib.rules.base import by_token, each
from bhlib.weighting import find_weighting, probabilities

COLUMNS = [
    "rank", "expert", "logit", "probability", "probability_threshold", "pvalue", "pvalue_threshold", "found", "kept",
    "weight", "bound",
]  # fmt: skip


@torch.no_grad()
def explain(
    rule: Rule,
    logits: Tensor,
    layer: int | None = None,
    *,
    weighting: str = "softmax",
    temperature: float = 1.0,
    routing: Routing | None = None,
    log_norms: Tensor | None = None,
) -> pd.DataFrame:
    """What a rule looked at, expert by expert, when it decided about a token.

    Parameters
    ----------
    rule : Rule
        Any rule of `bhlib.rules`, or one of your own. If its level differs by sequence, the tokens are those of a
        batch; for a single token give the rule at its own level, ``rule.at(rule.level[sequence])``.
    logits : Tensor [experts] or [tokens, experts], any float dtype
        Router logits of one token, or of several.
    layer : int, optional
        MoE layer that they come from; needed by rules and nulls that differ by layer.
    weighting, temperature
        As the rule is called with; they concern the weights (`bhlib.weighting.WEIGHTINGS`).
    routing : Routing, optional
        What was decided about these tokens, where it is known, say from `bhlib.records`. By default the rule decides.
    log_norms : Tensor, the shape of `logits`, optional
        What was added to the logits that the rule looked at (`bhlib.norms`).

    Returns
    -------
    pandas.DataFrame
        A row for each expert, in the order in which the rule ranks them:

        ``token``
            Number of the token; only for logits [tokens, experts].
        ``rank``, ``expert``
            Rank from 1, and the expert that holds it.
        ``logit``, ``probability``
            What the rule looked at, the router's own or with `log_norms` added; the softmax is taken at temperature 1.
        ``probability_threshold``
            The probability that an expert of this rank needs, where the rule compares probabilities with constants
            (`Threshold`; `BH` with a null of the probability, the same for all experts, and a step-up procedure that
            has critical values). NaN elsewhere.
        ``pvalue``, ``pvalue_threshold``
            The p-value, and the critical value of the rank: all ranks up to the last one whose p-value is at most its
            threshold are found. NaN for rules without p-values; the threshold also for procedures whose thresholds
            depend on the other p-values (Storey, two-stage, Higher Criticism) or that step down (Holm).
        ``found``
            Whether the procedure rejects the expert, or another rule chooses it, before the bounds.
        ``kept``, ``weight``
            Whether the token gets the expert, and the expert's weight, 0 if not.
        ``bound``
            Which bound changed the number of experts: ``"min_k"``, ``"max_k"`` or ``"none"``. The same in each row
            of a token. `TopK` and the other rules that state the number itself have no bound to decide.

    Raises
    ------
    TypeError, ValueError
        If the logits are not one or two axes of finite numbers, or the rule cannot route that many experts.
    """
    check_logits(logits)
    if logits.dim() > 2:
        raise ValueError(
            f"logits must be [experts] or [tokens, experts], got shape {tuple(logits.shape)}: "
            f"pick a layer and a token, or logits.reshape(-1, {logits.shape[-1]})."
        )
    rows = logits.detach().reshape(-1, logits.shape[-1])
    (num_tokens, num_experts), device = rows.shape, rows.device
    options: dict[str, Any] = {"weighting": weighting, "temperature": temperature}
    if log_norms is not None:
        options["log_norms"] = log_norms.reshape(rows.shape)
    if routing is None:
        routing = rule(rows, layer, **options)
    if isinstance(rule, Replay):  # it has repeated what was found and bounded when it was recorded
        scores = find_weighting(weighting).scores(rows, temperature)
        found, order = routing.counts, scores.argsort(dim=-1, descending=True, stable=True)
    else:
        found = _bounded(rule, 0, num_experts)(rows, layer, **options).counts
        order = _bounded(rule, num_experts, num_experts)(rows, layer, **options).experts
    order = _kept_first(order, routing.experts)
    counts, ranks = routing.counts[:, None], torch.arange(1, num_experts + 1, device=device)
    # One column more, for the empty slots.
    weights = routing.weights.new_zeros(num_tokens, num_experts + 1)
    weights.scatter_(-1, routing.experts % (num_experts + 1), routing.weights)
    decides = _deciding(rule)
    if log_norms is not None:
        rows = rows + options["log_norms"]
    pvalues = decides.pvalues(rows, layer) if isinstance(decides, BH) else torch.full_like(rows, torch.nan)
    needed = _thresholds(decides, num_experts, layer, device)
    probability_threshold, pvalue_threshold = (by_token(threshold, num_tokens) for threshold in needed)
    bound = np.select([(counts > found[:, None]).cpu(), (counts < found[:, None]).cpu()], ["min_k", "max_k"], "none")
    columns = {
        "rank": ranks,
        "expert": order,
        "logit": rows.gather(-1, order),
        "probability": probabilities(rows).gather(-1, order),
        "probability_threshold": probability_threshold,
        "pvalue": pvalues.gather(-1, order),
        "pvalue_threshold": pvalue_threshold,
        "found": ranks <= found[:, None],
        "kept": ranks <= counts,
        "weight": weights.gather(-1, order),
    }
    # To float64 first: numpy knows no bfloat16.
    columns = {name: x.double() if x.is_floating_point() else x for name, x in columns.items()}
    arrays = {name: x.expand(num_tokens, num_experts).flatten().cpu().numpy() for name, x in columns.items()}
    table = pd.DataFrame(arrays | {"bound": bound.repeat(num_experts)}, columns=COLUMNS)
    if logits.dim() == 2:
        table.insert(0, "token", np.arange(num_tokens).repeat(num_experts))
    return table


def _bounded(rule: Rule, min_k: int, max_k: int) -> Rule:
    """The same rule, and the rule inside it if it wraps one, with other bounds; shares what it has computed ahead."""
    changed = copy.copy(rule)
    inner = {name: _bounded(value, min_k, max_k) for name, value in vars(rule).items() if isinstance(value, Rule)}
    for name, value in (inner | {"min_k": min_k, "max_k": max_k}).items():
        object.__setattr__(changed, name, value)
    return changed


def _kept_first(order: Tensor, kept: Tensor) -> Tensor:
    """All experts [tokens, experts]: those `kept` [tokens, slots], -1 in empty slots, then the others by `order`."""
    num_tokens, num_experts = order.shape
    place = torch.arange(num_experts, device=order.device).expand(num_tokens, -1)
    key = torch.empty(num_tokens, num_experts + 1, dtype=order.dtype, device=order.device)
    key.scatter_(-1, order, place + num_experts)
    key.scatter_(-1, kept % (num_experts + 1), place[:, : kept.shape[-1]])
    return key[:, :num_experts].argsort(dim=-1)


def _deciding(rule: Rule) -> Rule:
    """The rule that decides how many experts: itself, or the one that it wraps."""
    inner = next((value for value in vars(rule).values() if isinstance(value, Rule)), None)
    return rule if inner is None else _deciding(inner)


def _thresholds(rule: Rule, num_experts: int, layer: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """What the probability, and the p-value, of each rank is compared with: float64, NaN where unknown.

    Each [levels, experts], or [1, experts] if it is the same for all.
    """
    unknown = torch.full((1, num_experts), torch.nan, dtype=torch.float64, device=device)
    if isinstance(rule, Threshold):
        return torch.tensor(each(rule.level), dtype=torch.float64, device=device)[:, None].expand(
            -1, num_experts
        ), unknown
    if not isinstance(rule, BH):
        return unknown, unknown
    try:
        critical = [critical_values(num_experts, x, rule.method, device=device) for x in rule.layer_levels(layer)]
    except ValueError:  # the procedure has no constants
        return unknown, unknown
    null, probability = rule.pvalues, unknown
    if rule.has_thresholds:
        thresholds = rule.thresholds(num_experts, layer, device).view(-1, num_experts)
        if hasattr(null, "probability"):
            probability = null.probability(thresholds, num_experts)
        elif null.statistic == "log_prob":
            probability = thresholds.double().exp()
    return probability, torch.stack(critical)
