"""Rules: from a token's router logits to the experts that it activates, with their weights.

A rule answers one question per token, *how many experts, and which*. The weights that the chosen experts get are
not the rule's business but the model's, so they are computed here once, for every rule alike, from the model's
own convention (`WEIGHTINGS`). Every rule is a small frozen dataclass with one method to write, `select` or,
for the rules that always keep the best-scored experts, `count`.

    rule = TopP(p=0.4, max_k=8)
    weights, experts, counts = rule(router_logits)          # Routing, one row per token
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from bhlib.procedures import canonical_method, check_alpha, critical_values, reject
from bhlib.pvalues import DirichletNull, PValueMaker, check_logits, make_pvalues

#: How a model turns the scores of the experts that it keeps into weights.
#: ``softmax``: the probabilities as they are (OLMoE); ``normalized``: divided by their sum (Mixtral, Qwen3-MoE);
#: ``softmax_selected``: a softmax over the kept logits alone (GPT-OSS, Granite).
WEIGHTINGS = ("softmax", "normalized", "softmax_selected")

#: Procedures whose decision compares the k-th smallest p-value with a constant: no p-values are needed then.
_CONSTANT_CRITICAL_VALUES = ("bh", "by", "hochberg", "bonferroni", "fixed")


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


def router_scores(router_logits: Tensor, weighting: str = "softmax", temperature: float = 1.0) -> Tensor:
    """The scores by which a model ranks its experts: probabilities, or the logits for ``softmax_selected``.

    Returns float32 [tokens, experts] (float64 for float64 logits). At temperature 1 the operations are those of
    transformers' routers, so that the result has the same bits.
    """
    wide = torch.promote_types(router_logits.dtype, torch.float32)
    logits = router_logits if temperature == 1.0 else router_logits.to(wide) / temperature
    return logits.to(wide) if weighting == "softmax_selected" else torch.softmax(logits, dim=-1, dtype=wide)


def gather_weights(scores: Tensor, order: Tensor, counts: Tensor, weighting: str = "softmax") -> Routing:
    """Weights of the first `counts` experts of each row of `order` [tokens, slots], by the model's convention."""
    kept = torch.arange(order.shape[-1], device=order.device) < counts[:, None]
    top = scores.gather(-1, order)
    if weighting == "softmax_selected":
        # A row that keeps nothing would be a softmax over nothing, NaN: nan_to_num gives it zeros.
        weights = torch.softmax(top.masked_fill(~kept, -torch.inf), dim=-1).nan_to_num(nan=0.0)
    else:
        weights = top.masked_fill(~kept, 0.0)
        if weighting == "normalized":
            total = weights.sum(dim=-1, keepdim=True)
            weights = weights / total.masked_fill(total == 0, 1.0)
    return Routing(weights, order.masked_fill(~kept, -1), counts)


@dataclass(frozen=True)
class Rule:
    """Base of all rules. Subclasses write `select`; everything else follows.

    Parameters
    ----------
    min_k, max_k : int
        Bounds on the number of experts per token, 0 <= min_k <= max_k. A rule that asks for fewer than `min_k`
        gets its best-ranked experts, one that asks for more than `max_k` is cut after its best.
    """

    min_k: int = field(default=1, kw_only=True)
    max_k: int = field(default=8, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("min_k", "max_k"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}.")
        if self.min_k < 0:
            raise ValueError(f"min_k must be 0 or more, got {self.min_k}; 1 is the usual choice.")
        if self.max_k < 1:
            raise ValueError(f"max_k must be 1 or more, got {self.max_k}.")
        if self.min_k > self.max_k:
            raise ValueError(
                f"min_k must not exceed max_k, got min_k={self.min_k} and max_k={self.max_k}: "
                f"lower min_k or raise max_k."
            )

    def select(self, router_logits: Tensor, scores: Tensor, layer: int | None) -> tuple[Tensor, Tensor]:
        """Rank the experts and say how many to keep.

        Parameters
        ----------
        router_logits : Tensor [tokens, experts]
            Logits in the model's dtype.
        scores : Tensor [tokens, experts], float32 or wider
            What the model ranks its experts by (`router_scores`).
        layer : int or None
            Index of the MoE layer, for rules whose parameters differ by layer.

        Returns
        -------
        order : Tensor [tokens, max_k], int64
            Experts, best first.
        counts : Tensor [tokens], int64
            How many of them to keep, between min_k and max_k.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define select() or count().")

    def __call__(
        self,
        router_logits: Tensor,
        layer: int | None = None,
        *,
        weighting: str = "softmax",
        temperature: float = 1.0,
    ) -> Routing:
        """Route tokens: router logits [tokens, experts] in any float dtype -> `Routing`."""
        self.check_num_experts(router_logits.shape[-1])
        scores = router_scores(router_logits, weighting, temperature)
        order, counts = self.select(router_logits, scores, layer)
        return gather_weights(scores, order, counts, weighting)

    def check_num_experts(self, num_experts: int) -> None:
        """Raise if the rule cannot work with so many experts."""
        if self.max_k > num_experts:
            raise ValueError(
                f"max_k must not exceed the number of experts, got max_k={self.max_k} for {num_experts} experts: "
                f"use max_k={num_experts} to allow them all."
            )


@dataclass(frozen=True)
class PrefixRule(Rule):
    """A rule that keeps the best-scored experts of a token: subclasses say how many."""

    def select(self, router_logits: Tensor, scores: Tensor, layer: int | None) -> tuple[Tensor, Tensor]:
        top, order = torch.topk(scores, self.max_k, dim=-1)
        return order, self.count(top, scores, layer).clamp(self.min_k, self.max_k)

    def count(self, top: Tensor, scores: Tensor, layer: int | None) -> Tensor:
        """Number of experts per token [tokens] int64, from the sorted best scores `top` [tokens, max_k]."""
        raise NotImplementedError(f"{type(self).__name__} has to define count().")


@dataclass(frozen=True)
class TopK(PrefixRule):
    """Static top-k, the model's own rule: the same `k` for every token.

    ``TopK(8)`` on a model with ``num_experts_per_tok=8`` gives the model's own outputs, bit for bit.
    """

    k: int = 8

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"k must be an int of 1 or more, got {self.k!r}.")
        object.__setattr__(self, "min_k", self.k)
        object.__setattr__(self, "max_k", self.k)

    def count(self, top: Tensor, scores: Tensor, layer: int | None) -> Tensor:
        return torch.full(top.shape[:1], self.k, device=top.device)


@dataclass(frozen=True)
class BH(Rule):
    """Multiple testing per token: keep the experts whose p-values the procedure rejects at level `alpha`.

    Parameters
    ----------
    alpha : float
        Level of the procedure, in (0, 1).
    pvalues : PValueMaker or str
        Maker of the p-values (`bhlib.pvalues`), or the name of one that needs no calibration.
    method : str
        Procedure, see `bhlib.procedures`; ``"bh"`` by default.

    Notes
    -----
    Where the null is shared by all experts and the procedure has constant critical values, the decision is made
    by comparing the k-th largest statistic with the statistic whose p-value is the k-th critical value. The
    decisions are the same as with p-values (tested), and no p-value is computed.

    `max_k` truncates after the procedure has run on all experts: a token for which 12 are significant gets its
    best `max_k`.
    """

    alpha: float = 0.05
    pvalues: PValueMaker | str = field(default_factory=DirichletNull)
    method: str = "bh"
    _thresholds: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_alpha(self.alpha)
        object.__setattr__(self, "method", canonical_method(self.method))
        object.__setattr__(self, "pvalues", make_pvalues(self.pvalues))

    def select(self, router_logits: Tensor, scores: Tensor, layer: int | None) -> tuple[Tensor, Tensor]:
        if self.pvalues.shared:
            order = torch.topk(scores, self.max_k, dim=-1).indices
            counts = self._num_significant(router_logits, layer)
        else:
            pvals = self.pvalues(router_logits, layer)
            counts = reject(pvals, self.alpha, self.method, check=False).sum(dim=-1)
            # Smallest p-value first; among equals (p = 0, conformal steps) the better-scored expert.
            by_score = torch.argsort(scores, dim=-1, descending=True, stable=True)
            by_pvalue = torch.argsort(pvals.gather(-1, by_score), dim=-1, stable=True)
            order = by_score.gather(-1, by_pvalue)[:, : self.max_k]
        return order, counts.clamp(self.min_k, self.max_k)

    def _num_significant(self, router_logits: Tensor, layer: int | None) -> Tensor:
        """Number of rejections per token [tokens], for a null shared by all experts."""
        if self.method not in _CONSTANT_CRITICAL_VALUES:
            return reject(self.pvalues(router_logits, layer), self.alpha, self.method, check=False).sum(dim=-1)
        threshold, rank = self._critical_statistics(router_logits.shape[-1], layer, router_logits.device)
        statistic = torch.sort(self.pvalues.statistic_of(router_logits), dim=-1, descending=True).values
        # Step-up: the largest k whose k-th largest statistic passes the k-th threshold.
        return torch.where(statistic >= threshold, rank, 0).amax(dim=-1)

    def _critical_statistics(self, num_experts: int, layer: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
        """Thresholds of the ordered statistics, and their ranks, each [num_experts]; computed once per layer."""
        key = (num_experts, layer, device)
        if key not in self._thresholds:
            self.pvalues.check_resolution(self.alpha, num_experts)
            critical = critical_values(num_experts, self.alpha, self.method)
            threshold = self.pvalues.critical_statistics(critical, layer).to(device)
            self._thresholds[key] = threshold, torch.arange(1, num_experts + 1, device=device)
        return self._thresholds[key]


def benjamini_hochberg_routing(
    router_logits: Tensor,
    alpha: float = 0.05,
    temperature: float = 1.0,
    min_k: int = 1,
    max_k: int = 8,
    *,
    pvalues: PValueMaker | str = "dirichlet",
    method: str = "bh",
    layer: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Route tokens by the Benjamini–Hochberg procedure, outside any model.

    Parameters
    ----------
    router_logits : Tensor [tokens, experts] or [batch, sequence, experts]
        Raw logits, any float dtype. Decisions are made in float32 or wider.
    alpha : float
        Level of the procedure, in (0, 1).
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

    Returns
    -------
    weights : Tensor [..., experts], float32 or wider
        Non-negative, zero for experts that were not selected; sums to 1 (to 0 where nothing was selected).
    experts : Tensor [..., max_k], int64
        Selected experts, largest weight first (smallest p-value first where p-values differ by expert); -1 pads.
    counts : Tensor [...], int64
        Number of experts selected.

    Examples
    --------
    >>> logits = torch.zeros(1, 64); logits[0, :3] = 9.0; logits[0, 3:] = torch.linspace(-1, 1, 61)
    >>> weights, experts, counts = benjamini_hochberg_routing(logits, alpha=0.05)
    >>> int(counts[0]), sorted(experts[0, :3].tolist())
    (3, [0, 1, 2])
    """
    check_temperature(temperature)
    if pvalues == "softmax":
        pvalues = make_pvalues("softmax", temperature=temperature)
    rule = BH(alpha=alpha, pvalues=pvalues, method=method, min_k=min_k, max_k=max_k)
    return _dense(rule, router_logits, temperature, layer)


def topk_routing(
    router_logits: Tensor, k: int = 8, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Static top-k with the same returns as `benjamini_hochberg_routing`: the baseline."""
    check_temperature(temperature)
    return _dense(TopK(k), router_logits, temperature, None)


def _dense(
    rule: Rule, router_logits: Tensor, temperature: float, layer: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply a rule to logits of any leading shape; weights scattered to one column per expert."""
    check_logits(router_logits)
    lead, num_experts = router_logits.shape[:-1], router_logits.shape[-1]
    weights, experts, counts = rule(
        router_logits.reshape(-1, num_experts), layer, weighting="normalized", temperature=temperature
    )
    dense = weights.new_zeros(len(weights), num_experts)
    # Empty slots add their weight 0 to expert 0.
    dense.scatter_add_(-1, experts.clamp(min=0), weights)
    return dense.view(*lead, num_experts), experts.view(*lead, -1), counts.view(lead)


def check_temperature(temperature: float) -> None:
    """Raise a ValueError unless 0 < temperature < inf."""
    if not 0 < temperature < float("inf"):
        raise ValueError(
            f"temperature must be a finite number above 0, got {temperature!r}; 1.0 leaves the softmax as it is."
        )


