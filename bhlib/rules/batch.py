"""Rules that look at a whole batch: an expert whose weights another token has loaded anyway is free.

Up to some hundred tokens the time of a decoding step is that of reading experts' weights, so what counts is not how
many experts a token takes but how many different ones a batch takes. Each rule here says which experts a token *wants*;
what any token of the batch wants is loaded, and every token then takes its best `max_k` of what is loaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bhlib.procedures import benjamini_hochberg, check_alpha, is_whole
from bhlib.pvalues import DirichletNull, PValueMaker, make_pvalues
from bhlib.rules.base import Rule, TopK
from bhlib.rules.bh import BH
from bhlib.rules.rivals import Threshold
from bhlib.weighting import probabilities


@dataclass(frozen=True)
class BatchRule(Rule):
    """Base of rules over a batch: subclasses write `wanted` and `plain`.

    Parameters
    ----------
    batch : int, optional
        By default all tokens of a call are decoded together, as in a step of `generate()`. With a number, a call holds
        this many sequences one after the other, and the tokens at the same place in them are decoded together: what a
        pass with teacher forcing has to be told, to route as a server does that decodes the sequences side by side.
    most : int
        A batch of more tokens is routed by the rule's `plain` twin, each token by itself: in a long prompt every expert
        is loaded anyway, and fewer experts per token save arithmetic alone.

    Notes
    -----
    A rule sees logits and no mask. Padding, and rows of sequences that have ended, are tokens to it: their experts are
    loaded, and so become free to others. A server that fills a batch up should leave such rows out.

    A prompt of at most `most` tokens is a batch too. Nothing is wrong with that when text is generated, since a prompt
    is known; but the loss of a text is to be measured with `batch`, else a token is routed by what comes after it.

    Equal logits give equal decisions; a token's decision depends on those that share its batch, by intention.
    """

    batch: int | None = field(default=None, kw_only=True)
    most: int = field(default=512, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("batch", "most"):
            value = getattr(self, name)
            if not (is_whole(value) and value >= 1) and not (name == "batch" and value is None):
                raise ValueError(f"{name} must be an int of 1 or more, got {value!r}.")
        super().__post_init__()

    def _checked(self, level: Any) -> Any:
        if getattr(level, "ndim", 0) or (isinstance(level, Sequence) and not isinstance(level, str)):
            raise TypeError(
                f"{self.level_name} must be one number, got {level!r}: the tokens of a batch share their experts, and "
                f"so they share their level."
            )
        return super()._checked(level)

    @property
    def plain(self) -> Rule:
        """The rule for tokens that share nothing."""
        raise NotImplementedError(f"{type(self).__name__} has to define plain.")

    def wanted(self, router_logits: Tensor, ranks: Tensor, layer: int | None) -> Tensor:
        """Which experts a token asks for, bool [batches, tokens, experts].

        Parameters
        ----------
        router_logits : Tensor [batches, tokens, experts]
        ranks : Tensor [batches, tokens, experts], int64
            0 for the expert that the model scores best.
        layer : int or None
        """
        raise NotImplementedError(f"{type(self).__name__} has to define wanted().")

    def select(self, router_logits: Tensor, scores: Tensor, layer: int | None) -> tuple[Tensor, Tensor]:
        num_tokens, num_experts = router_logits.shape
        size = num_tokens if self.batch is None else self.batch
        if num_tokens % max(size, 1):
            raise ValueError(
                f"{num_tokens} tokens are not {size} sequences of equal length: set batch to the number of sequences "
                f"in a call, or to None if all tokens of a call are decoded together."
            )
        if size > self.most or not num_tokens:
            return self.plain.select(router_logits, scores, layer)

        def grouped(values: Tensor) -> Tensor:  # the tokens at the same place in all sequences
            return values.view(size, num_tokens // size, num_experts).transpose(0, 1)

        ranking = scores.argsort(dim=-1, descending=True, stable=True)
        places = torch.arange(num_experts, device=scores.device).expand_as(ranking)
        ranks = grouped(torch.empty_like(ranking).scatter_(-1, ranking, places))
        wanted = self.wanted(grouped(router_logits), ranks, layer) & (ranks < self.max_k)
        loaded = (wanted | (ranks < self.min_k)).any(dim=1, keepdim=True)
        order = ranks.masked_fill(~loaded, num_experts).sort(dim=-1, stable=True).indices[..., : self.max_k]
        counts = loaded.sum(dim=-1).clamp(max=self.max_k).expand(order.shape[:2])
        return order.transpose(0, 1).reshape(num_tokens, -1), counts.transpose(0, 1).reshape(num_tokens)


@dataclass(frozen=True)
class OEA(BatchRule):
    """Opportunistic expert activation: the best `k0` experts of each token, and what others have loaded.

    Oncescu et al. 2025 (arXiv:2511.02237) describe two phases: a baseline for each token, of its best experts, and then
    further experts of its own ranking if other tokens of the batch have them loaded. Here the baseline is a number, and
    a token goes on until it has `max_k`. The weights follow the model, as for every rule. Its plain twin, beyond `most`
    tokens, is the model's own static top-`max_k`; one token alone gets its best `k0`.
    """

    k0: int = 3

    level_name = "k0"

    def _check_level(self, level: float) -> None:
        if not is_whole(level) or not 1 <= level <= self.max_k:
            raise ValueError(f"k0 must be an int between 1 and max_k={self.max_k}, got {level!r}.")

    @property
    def plain(self) -> Rule:
        return TopK(self.max_k)

    def wanted(self, router_logits: Tensor, ranks: Tensor, layer: int | None) -> Tensor:
        return ranks < self.k0


@dataclass(frozen=True)
class BatchBH(BatchRule):
    """Weighted BH per token: an expert that other tokens want costs fewer bytes, and needs less evidence.

    A token wants what BH finds at level `alpha` in its p-values divided by weights of arithmetic mean 1 (Genovese,
    Roeder & Wasserman 2006, Biometrika 93, 509-524), which `demand_weights` makes of how many *other* tokens of the
    batch want an expert without weights. Alone, or with a `boost` of 0, that is BH without weights.

    Parameters
    ----------
    alpha : float
        Level of the procedure, in (0, 1).
    pvalues : PValueMaker or str
        As for `BH`; experts are ranked by the model's scores whatever the p-values.
    boost : float
        What each other token that wants an expert adds to its weight, 0 or more. Between 1 and 10 it made
        little difference on validation text.

    Notes
    -----
    What is proven: a token's own p-values have no part in its weights. If they are independent of those of the other
    tokens, the weights are constants given the others, and the theorem of Genovese et al. holds given them: with
    independent null p-values within the token, the share of null experts among those that it finds is at most `alpha`
    in expectation. In the first MoE layer tokens of different documents are so.

    What is not: tokens of one document, which attention ties together; and every layer behind the first, since what a
    batch has loaded there changed the hidden states of all its tokens. Nor does the statement cover the experts that a
    token takes because others have loaded them, which are tested by nobody, or the bounds `min_k` and `max_k`.
    """

    alpha: float = 1e-3
    pvalues: PValueMaker = field(default_factory=DirichletNull)
    boost: float = 3.0

    level_name = "alpha"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "pvalues", make_pvalues(self.pvalues))
        self.pvalues.check()
        if not 0 <= self.boost < float("inf"):
            raise ValueError(f"boost must be a finite number of 0 or more, got {self.boost!r}; 0 gives no weights.")

    def _check_level(self, level: float) -> None:
        check_alpha(level)

    @property
    def plain(self) -> Rule:
        return BH(self.alpha, self.pvalues, min_k=self.min_k, max_k=self.max_k)

    def check_model(self, num_layers: int, num_experts: int) -> None:
        super().check_model(num_layers, num_experts)
        self.pvalues.check_model(num_layers, num_experts)

    def wanted(self, router_logits: Tensor, ranks: Tensor, layer: int | None) -> Tensor:
        pvals = self.pvalues(router_logits.flatten(0, 1), layer).view(router_logits.shape)
        found = benjamini_hochberg(pvals, self.alpha, check=False)
        if not self.boost:
            return found
        weights = demand_weights(found, self.boost).to(pvals.dtype)
        return benjamini_hochberg(pvals / weights, self.alpha, check=False)


def demand_weights(found: Tensor, boost: float) -> Tensor:
    """Weights of a token's hypotheses, by how many other tokens of its batch find them.

    Parameters
    ----------
    found : Tensor [..., tokens, experts], bool
        What each token finds by itself.
    boost : float
        The weight of an expert is 1 plus this for each of those, and all is divided by its mean over experts.

    Returns
    -------
    Tensor [..., tokens, experts], float64
        Of mean 1 over the experts. The row of a token does not depend on its row in `found`.
    """
    others = found.sum(dim=-2, keepdim=True) - found.long()
    weights = 1 + boost * others.double()
    return weights / weights.mean(dim=-1, keepdim=True)


@dataclass(frozen=True)
class BatchThreshold(BatchRule):
    """Load an expert if its probabilities over the batch, squared and summed, have a root of at least `threshold`.

    If the outputs of dropped experts are unrelated, the square of what a token misses is the sum of their squared
    weights; an expert is loaded where all tokens together would miss more than a constant for its bytes. Each token
    has its best `min_k` besides. A token alone is routed by `Threshold`.
    """

    threshold: float = 0.1

    level_name = "threshold"

    def _check_level(self, level: float) -> None:
        super()._check_level(level)
        if level < 0:
            raise ValueError(f"threshold must be 0 or more, got {level!r}.")

    @property
    def plain(self) -> Rule:
        return Threshold(min(self.threshold, 1.0), min_k=self.min_k, max_k=self.max_k)

    def wanted(self, router_logits: Tensor, ranks: Tensor, layer: int | None) -> Tensor:
        probs = probabilities(router_logits)
        missed = probs.square().sum(dim=1, keepdim=True).sqrt()
        return (missed >= self.threshold).expand(probs.shape)
