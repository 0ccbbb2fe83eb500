"""What every rule is: its question, its bounds, and what follows from its answer."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from bhlib.procedures import is_whole
from bhlib.weighting import find_weighting, probabilities


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


@dataclass(frozen=True)
class Rule:
    """Base of all rules. Subclasses write `select`; everything else follows.

    A rule of your own is a frozen dataclass with one method::

        @dataclass(frozen=True)
        class AboveAverage(ProbabilityRule):
            factor: float = 4.0  # keep the experts whose probability is above `factor` times the mean of all

            def count(self, top, probs, layer):
                return (top > self.factor / probs.shape[-1]).sum(dim=-1)

        with RoutingPatch(model, AboveAverage(factor=3.0, max_k=16)) as patch: ...

    One entry in `bhlib.rules.names` brings it into the sweep command and into every figure that compares rules.

    Parameters
    ----------
    min_k, max_k : int
        Bounds on the number of experts per token, 0 <= min_k <= max_k. If a rule asks for fewer than `min_k`,
        the next best are added; if for more than `max_k`, only the best are kept.
    """

    min_k: int = field(default=1, kw_only=True)
    max_k: int = field(default=8, kw_only=True)

    _upper_bound = "max_k"  # what the user calls the largest number of experts

    def __post_init__(self) -> None:
        for name in ("min_k", "max_k"):
            value = getattr(self, name)
            if not is_whole(value):
                raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}.")
            object.__setattr__(self, name, int(value))
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
            What the model ranks its experts by (`bhlib.weighting.Weighting.scores`).
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
        """Route tokens: router logits [tokens, experts] in any float dtype -> `Routing`.

        `weighting` is a name in `bhlib.weighting.WEIGHTINGS`; `temperature` divides the logits that the weights are
        made of.
        """
        self.check_num_experts(router_logits.shape[-1])
        convention = find_weighting(weighting)
        scores = convention.scores(router_logits, temperature)
        order, counts = self.select(router_logits, scores, layer)
        kept = torch.arange(order.shape[-1], device=order.device) < counts[:, None]
        weights = convention.weights(scores.gather(-1, order), kept)
        return Routing(weights, order.masked_fill(~kept, -1), counts)

    def prepare(self, num_experts: int, layer: int, device: torch.device) -> None:
        """Compute ahead what `fused` looks up, so that no compiler has to see it computed."""

    def fused(
        self,
        router_logits: Tensor,
        layer: int | None = None,
        *,
        weighting: str = "softmax",
        temperature: float = 1.0,
    ) -> Routing:
        """The same routing, with the same options, by a kernel where rule and device have one; here, without."""
        return self(router_logits, layer, weighting=weighting, temperature=temperature)

    def rewind(self) -> None:
        """Forget earlier passes; called whenever the rule is put into a model. Most rules remember none."""

    def end_pass(self) -> None:
        """Called after each forward pass of the model that comes to its end. Most rules have no use for it."""

    def check_model(self, num_layers: int, num_experts: int) -> None:
        """Raise if the rule cannot route a model of this many MoE layers and experts."""
        self.check_num_experts(num_experts)

    def check_num_experts(self, num_experts: int) -> None:
        """Raise if the rule cannot work with this many experts."""
        if self.max_k > num_experts:
            name, value = self._upper_bound, getattr(self, self._upper_bound)
            mend = f"{num_experts} at most" if isinstance(value, tuple) else f"{name}={num_experts} to allow them all"
            raise ValueError(
                f"{name} must not exceed the number of experts, got {name}={value} for {num_experts} experts: "
                f"use {mend}."
            )


@dataclass(frozen=True)
class PrefixRule(Rule):
    """A rule that keeps the best-scored experts of a token: subclasses say how many.

    Scores are what the model ranks by, which for some families are raw logits: a rule that looks at their size is a
    `ProbabilityRule`.
    """

    def select(self, router_logits: Tensor, scores: Tensor, layer: int | None) -> tuple[Tensor, Tensor]:
        top, order = torch.topk(scores, self.max_k, dim=-1)
        return order, self.count(top, scores, layer).clamp(self.min_k, self.max_k)

    def count(self, top: Tensor, scores: Tensor, layer: int | None) -> Tensor:
        """Number of experts per token [tokens] int64, from the sorted best scores `top` [tokens, max_k]."""
        raise NotImplementedError(f"{type(self).__name__} has to define count().")


@dataclass(frozen=True)
class ProbabilityRule(PrefixRule):
    """A rule that counts experts by their probabilities, the softmax of the logits at temperature 1.

    So a temperature changes the weights of the kept experts and not their number, as for `BH`; and a rule means the
    same for models that rank their experts by logits (``softmax_selected``), or whose weights are no softmax.
    """

    def select(self, router_logits: Tensor, scores: Tensor, layer: int | None) -> tuple[Tensor, Tensor]:
        order = torch.topk(scores, self.max_k, dim=-1).indices
        probs = probabilities(router_logits)
        return order, self.count(probs.gather(-1, order), probs, layer).clamp(self.min_k, self.max_k)

    def count(self, top: Tensor, probs: Tensor, layer: int | None) -> Tensor:
        """Number of experts per token [tokens] int64.

        Parameters
        ----------
        top : Tensor [tokens, max_k]
            Probabilities of the best experts, largest first.
        probs : Tensor [tokens, experts]
            Probabilities of all.
        layer : int or None
        """
        raise NotImplementedError(f"{type(self).__name__} has to define count().")


@dataclass(frozen=True)
class TopK(PrefixRule):
    """Static top-k, the model's own rule: the same `k` for every token.

    ``TopK(8)`` on a model with ``num_experts_per_tok=8`` gives the model's own outputs, bit for bit.
    """

    k: int = 8

    _upper_bound = "k"

    def __post_init__(self) -> None:
        if not is_whole(self.k) or self.k < 1:
            raise ValueError(f"k must be an int of 1 or more, got {self.k!r}.")
        for name in ("k", "min_k", "max_k"):
            object.__setattr__(self, name, int(self.k))

    def count(self, top: Tensor, scores: Tensor, layer: int | None) -> Tensor:
        return torch.full(top.shape[:1], self.k, device=top.device)
