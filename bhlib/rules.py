"""Rules: from a token's router logits to the experts that it activates, with their weights.

A rule answers one question per token, *how many experts, and which*. The weights that the chosen experts get are
not the rule's business but the model's, so they are computed here once, for every rule alike, from the model's
own convention (`WEIGHTINGS`). Every rule is a small frozen dataclass with one method to write, `select` or,
for the rules that always keep the best-scored experts, `count`.

    rule = TopP(p=0.4, max_k=8)
    weights, experts, counts = rule(router_logits)          # Routing, one row per token
"""

import numbers
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from bhlib import kernels
from bhlib.procedures import ascending, canonical_method, check_alpha, critical_values, is_whole, reject
from bhlib.pvalues import DirichletNull, PValueMaker, check_logits, check_temperature, make_pvalues

#: How a model turns the scores of the experts that it keeps into weights.
#: ``softmax``: the probabilities as they are (OLMoE); ``normalized``: divided by their sum (Mixtral, Qwen3-MoE);
#: ``softmax_selected``: a softmax over the kept logits alone (GPT-OSS, Granite).
WEIGHTINGS = ("softmax", "normalized", "softmax_selected")

#: Procedures whose decision compares the k-th smallest p-value with a constant: no p-values are needed then.
_CONSTANT_CRITICAL_VALUES = ("bh", "by", "hochberg", "bonferroni", "fixed")

#: Tokens whose float32 logits take a megabyte, for 64 experts.
_CACHED_TOKENS = 4096


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

    A rule of your own is a frozen dataclass with one method::

        @dataclass(frozen=True)
        class AboveAverage(PrefixRule):
            factor: float = 4.0  # keep the experts whose score is above `factor` times the token's mean score

            def count(self, top, scores, layer):
                return (top > self.factor * scores.mean(dim=-1, keepdim=True)).sum(dim=-1)

        with RoutingPatch(model, AboveAverage(factor=3.0, max_k=16)) as patch: ...

    Parameters
    ----------
    min_k, max_k : int
        Bounds on the number of experts per token, 0 <= min_k <= max_k. A rule that asks for fewer than `min_k`
        gets its best-ranked experts, one that asks for more than `max_k` is cut after its best.
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

    def prepare(self, num_experts: int, layer: int, device: torch.device) -> None:
        """Compute ahead what `fused` looks up, so that no compiler has to see it computed."""

    def fused(self, router_logits: Tensor, layer: int | None = None, **options) -> Routing:
        """The same routing, with the same options, by a kernel, for rules and devices that have one; here, without."""
        return self(router_logits, layer, **options)

    def rewind(self) -> None:
        """Forget earlier passes; called whenever the rule is put into a model. Most rules remember none."""

    def end_pass(self) -> None:
        """Called after each forward pass of the model that comes to its end. Most rules have no use for it."""

    def check_model(self, num_layers: int, num_experts: int) -> None:
        """Raise if the rule cannot route a model of so many MoE layers and experts."""
        self.check_num_experts(num_experts)

    def check_num_experts(self, num_experts: int) -> None:
        """Raise if the rule cannot work with so many experts."""
        if self.max_k > num_experts:
            name, value = self._upper_bound, getattr(self, self._upper_bound)
            mend = f"{num_experts} at most" if isinstance(value, tuple) else f"{name}={num_experts} to allow them all"
            raise ValueError(
                f"{name} must not exceed the number of experts, got {name}={value} for {num_experts} experts: "
                f"use {mend}."
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

    _upper_bound = "k"

    def __post_init__(self) -> None:
        if not is_whole(self.k) or self.k < 1:
            raise ValueError(f"k must be an int of 1 or more, got {self.k!r}.")
        for name in ("k", "min_k", "max_k"):
            object.__setattr__(self, name, int(self.k))

    def count(self, top: Tensor, scores: Tensor, layer: int | None) -> Tensor:
        return torch.full(top.shape[:1], self.k, device=top.device)


# -- rivals: what people use, under the same interface. Each keeps a prefix of the token's best experts. -------------


@dataclass(frozen=True)
class StaticPerLayer(PrefixRule):
    """Static top-k with a `k` of its own in each layer, chosen on calibration data.

    The idea of LExI (Chitty-Venkata et al. 2025, arXiv:2509.02753), which measures each layer's sensitivity on random
    inputs. `bhlib.tuning.choose_static_per_layer` measures it as loss on text instead.

    Parameters
    ----------
    ks : sequence of int
        Experts per token in each MoE layer, in order of depth.
    """

    ks: tuple[int, ...] = ()

    _upper_bound = "ks"

    def __post_init__(self) -> None:
        ks = tuple(self.ks)
        if not ks or not all(is_whole(k) and k >= 1 for k in ks):
            raise ValueError(f"ks must hold one int of 1 or more per MoE layer, got {self.ks!r}.")
        ks = tuple(map(int, ks))
        for name, value in (("ks", ks), ("min_k", min(ks)), ("max_k", max(ks))):
            object.__setattr__(self, name, value)

    def check_model(self, num_layers: int, num_experts: int) -> None:
        super().check_model(num_layers, num_experts)
        if num_layers != len(self.ks):
            raise ValueError(
                f"ks has {len(self.ks)} entries for a model of {num_layers} MoE layers: give one for each layer."
            )

    def count(self, top: Tensor, scores: Tensor, layer: int | None) -> Tensor:
        if layer is None or not 0 <= layer < len(self.ks):
            raise ValueError(f"layer must lie in 0..{len(self.ks) - 1} for ks={self.ks}, got {layer}.")
        return torch.full(top.shape[:1], self.ks[layer], device=top.device)


@dataclass(frozen=True)
class ProbabilityRule(PrefixRule):
    """A rule that counts experts by their probabilities, the softmax of the logits at temperature 1.

    So a temperature changes the weights of the kept experts and not their number, as for `BH`; and a rule means the
    same for models that rank their experts by logits (``softmax_selected``).
    """

    def select(self, router_logits: Tensor, scores: Tensor, layer: int | None) -> tuple[Tensor, Tensor]:
        order = torch.topk(scores, self.max_k, dim=-1).indices
        probs = router_scores(router_logits)
        return order, self.count(probs.gather(-1, order), probs, layer).clamp(self.min_k, self.max_k)


@dataclass(frozen=True)
class Threshold(ProbabilityRule):
    """Keep every expert with a probability of at least `threshold`.

    One constant for all tokens, where the top-any gating of DynMoE (Guo et al. 2024, arXiv:2405.14297) trains one per
    expert. It is also `BH` with ``method="fixed"`` and ``DirichletNull(1)``, at alpha = (1 - threshold)^(experts - 1).
    """

    threshold: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_fraction("threshold", self.threshold)

    def count(self, top: Tensor, scores: Tensor, layer: int | None) -> Tensor:
        return (top >= self.threshold).sum(dim=-1)


@dataclass(frozen=True)
class TopP(ProbabilityRule):
    """Keep the fewest experts whose probabilities add up to at least `p`.

    Huang et al. 2024, "Harder tasks need more experts: dynamic routing in MoE models" (arXiv:2403.07652), there with a
    router that is trained for it.
    """

    p: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_fraction("p", self.p)

    def count(self, top: Tensor, scores: Tensor, layer: int | None) -> Tensor:
        mass_before = top.cumsum(dim=-1) - top
        return (mass_before < self.p).sum(dim=-1)


@dataclass(frozen=True)
class MinP(ProbabilityRule):
    """Keep the experts with a probability above `ratio` times that of the best one, and at least `min_k`.

    The min-p of sampling (Nguyen et al. 2024, arXiv:2407.01082), applied to experts as "smart expert reduction" in
    ik_llama.cpp (pull request 239, 2025), whose ``-ser K,t`` is ``MinP(t, min_k=K)``.
    """

    ratio: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_fraction("ratio", self.ratio)

    def count(self, top: Tensor, scores: Tensor, layer: int | None) -> Tensor:
        return (top > self.ratio * top[:, :1]).sum(dim=-1)


@dataclass(frozen=True)
class ExpertDropRatio(ProbabilityRule):
    """Keep the next expert while its probability is at least `beta` times the sum of those kept before it.

    Expert skipping of NAEE (Lu et al. 2024, "Not all experts are equal", arXiv:2402.14800) is defined for two experts:
    the second is skipped if w_2 < beta w_1. Comparing with the sum of all that are kept already says the same for two
    and extends it to any number. The ratio falls with the rank, so that the experts kept are a prefix.
    """

    beta: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_fraction("beta", self.beta)

    def count(self, top: Tensor, scores: Tensor, layer: int | None) -> Tensor:
        kept_before = top.cumsum(dim=-1) - top
        return (top >= self.beta * kept_before).sum(dim=-1)


@dataclass(frozen=True)
class EntropyK(ProbabilityRule):
    """More experts where the router hesitates: k is a step function of the entropy of its probabilities.

    Adaptive-K (Balsamo 2026, doi:10.5281/zenodo.18282008): per token, k = 1 below the first entropy threshold and a
    larger k beyond each further one. Its thresholds are tuned per model; here, `bhlib.tuning.entropy_thresholds`
    takes them from calibration data.

    Parameters
    ----------
    thresholds : sequence of float, increasing
        Entropies in nats, at most log(experts).
    ks : sequence of int, one more than `thresholds`
        Experts of a token whose entropy exceeds so many thresholds: ``ks[0]`` if none, ``ks[-1]`` if all.
    """

    thresholds: tuple[float, ...] = (2.0, 2.5)
    ks: tuple[int, ...] = (2, 4, 8)

    _upper_bound = "ks"

    def __post_init__(self) -> None:
        thresholds, ks = tuple(self.thresholds), tuple(self.ks)
        if len(ks) != len(thresholds) + 1:
            raise ValueError(
                f"ks must have one entry more than thresholds, got {len(ks)} and {len(thresholds)}: ks={ks}, "
                f"thresholds={thresholds}."
            )
        if list(thresholds) != sorted(thresholds):
            raise ValueError(f"thresholds must be increasing, got {thresholds}.")
        if not all(is_whole(k) and k >= 1 for k in ks):
            raise ValueError(f"ks must hold ints of 1 or more, got {ks}.")
        ks = tuple(map(int, ks))
        for name, value in (("thresholds", thresholds), ("ks", ks), ("min_k", min(ks)), ("max_k", max(ks))):
            object.__setattr__(self, name, value)

    def count(self, top: Tensor, scores: Tensor, layer: int | None) -> Tensor:
        entropy = torch.special.entr(scores).sum(dim=-1)
        thresholds = torch.tensor(self.thresholds, dtype=entropy.dtype, device=entropy.device)
        return torch.tensor(self.ks, device=entropy.device)[torch.searchsorted(thresholds, entropy)]


def _check_fraction(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number in [0, 1], got {value!r}.")


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
    layer_weights : sequence of float, optional
        A factor per MoE layer on the odds of `alpha`: layer l is tested at ``w a / (1 - a + w a)``. A layer with a
        weight above 1 gets more experts. The weights are chosen beforehand, on calibration text
        (`bhlib.tuning.choose_layer_weights`). Each token and layer is still a test by itself, at its layer's level;
        nothing is promised over the layers together. This is not the weighted BH procedure of Genovese, Roeder and
        Wasserman (2006), which is one step-up over pooled hypotheses with weights of arithmetic mean 1.

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
    layer_weights: tuple[float, ...] | None = None
    _thresholds: dict = field(default_factory=dict, init=False, repr=False, compare=False)
    _cuts: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_alpha(self.alpha)
        object.__setattr__(self, "alpha", float(self.alpha))
        object.__setattr__(self, "method", canonical_method(self.method))
        object.__setattr__(self, "pvalues", make_pvalues(self.pvalues))
        self.pvalues.check()
        if self.layer_weights is not None:
            weights = tuple(float(weight) for weight in self.layer_weights)
            if not weights or not all(0 < weight < float("inf") for weight in weights):
                raise ValueError(
                    f"layer_weights must hold one finite number above 0 per MoE layer, got {self.layer_weights!r}; "
                    f"None treats all layers alike."
                )
            object.__setattr__(self, "layer_weights", weights)

    def level(self, layer: int | None) -> float:
        """The level at which a layer is tested, by itself: `alpha`, its odds times the layer's weight."""
        if self.layer_weights is None:
            return self.alpha
        if layer is None or not 0 <= layer < len(self.layer_weights):
            raise ValueError(f"layer must lie in 0..{len(self.layer_weights) - 1} for layer_weights, got {layer}.")
        weighted = self.layer_weights[layer] * self.alpha
        return weighted / (1 - self.alpha + weighted)

    def select(self, router_logits: Tensor, scores: Tensor, layer: int | None) -> tuple[Tensor, Tensor]:
        if self.pvalues.shared:
            order = torch.topk(scores, self.max_k, dim=-1).indices
            # On a CPU in pieces that stay in its cache: twice as fast.
            size = _CACHED_TOKENS if router_logits.device.type == "cpu" else max(len(router_logits), 1)
            counts = torch.cat([self._num_significant(piece, layer) for piece in router_logits.split(size)])
        else:
            pvals = self.pvalues(router_logits, layer)
            counts = reject(pvals, self.level(layer), self.method, check=False).sum(dim=-1)
            # Smallest p-value first; among equals (p = 0, conformal steps) the better-scored expert.
            by_score = torch.argsort(scores, dim=-1, descending=True, stable=True)
            by_pvalue = torch.argsort(pvals.gather(-1, by_score), dim=-1, stable=True)
            order = by_score.gather(-1, by_pvalue)[:, : self.max_k]
        return order, counts.clamp(self.min_k, self.max_k)

    def check_model(self, num_layers: int, num_experts: int) -> None:
        super().check_model(num_layers, num_experts)
        self.pvalues.check_model(num_layers, num_experts)
        if self.layer_weights is not None and len(self.layer_weights) != num_layers:
            raise ValueError(
                f"layer_weights has {len(self.layer_weights)} entries for a model of {num_layers} MoE layers: "
                f"give one for each layer."
            )

    def prepare(self, num_experts: int, layer: int, device: torch.device) -> None:
        self._cut_table(num_experts, layer, device)

    def fused(
        self,
        router_logits: Tensor,
        layer: int | None = None,
        *,
        weighting: str = "softmax",
        temperature: float = 1.0,
    ) -> Routing:
        """The same routing by one kernel, on a device that has it and for a statistic that it knows.

        Sums are taken in another order: weights agree to 1e-5, and a statistic so close to its threshold that
        rounding decides may fall on the other side.
        """
        table = None
        if router_logits.dtype != torch.float64:
            table = self._cut_table(router_logits.shape[-1], layer, router_logits.device)
        if table is None:
            return self(router_logits, layer, weighting=weighting, temperature=temperature)
        from bhlib.kernels.routing import bh_route  # imports Triton, which not everybody has

        statistic, exclude_top, cuts = table
        return Routing(
            *bh_route(
                router_logits,
                cuts,
                statistic=statistic,
                exclude_top=exclude_top,
                min_k=self.min_k,
                max_k=self.max_k,
                weighting=weighting,
                temperature=temperature,
            )
        )

    def _cut_table(self, num_experts: int, layer: int | None, device: torch.device) -> tuple[str, int, Tensor] | None:
        """What the kernel compares with what (`bhlib.kernels.routing.cut_table`), None if it cannot; computed once."""
        key = (num_experts, layer, str(device))
        if key not in self._cuts:
            table = None
            if kernels.available() and (device.type == "cuda" or kernels.interpreted()):
                from bhlib.kernels.routing import cut_table

                if self.pvalues.shared and self.method in _CONSTANT_CRITICAL_VALUES:
                    thresholds, _ = self._critical_statistics(num_experts, layer, device)
                    table = cut_table(self.pvalues, thresholds, num_experts)
            self._cuts[key] = table
        return self._cuts[key]

    def _num_significant(self, router_logits: Tensor, layer: int | None) -> Tensor:
        """Number of rejections per token [tokens], for a null shared by all experts."""
        if self.method not in _CONSTANT_CRITICAL_VALUES:
            pvals = self.pvalues(router_logits, layer)
            return reject(pvals, self.level(layer), self.method, check=False).sum(dim=-1)
        threshold, rank = self._critical_statistics(router_logits.shape[-1], layer, router_logits.device)
        statistic = self.pvalues.statistic_of(router_logits, top=ascending(router_logits.float()).flip(-1))
        # Step-up: the largest k whose k-th largest statistic passes the k-th threshold.
        return (rank * (statistic >= threshold)).amax(dim=-1).long()

    def _critical_statistics(self, num_experts: int, layer: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
        """Thresholds of the ordered statistics, and their ranks, each [num_experts]; computed once per layer."""
        level = self.level(layer)
        if self.pvalues.num_layers is None:
            layer = None  # one null for all layers
        key = (num_experts, layer, level, device)
        if key not in self._thresholds:
            self.pvalues.check_resolution(level, num_experts)
            critical = critical_values(num_experts, level, self.method)
            threshold = self.pvalues.critical_statistics(critical, layer).to(device)
            self._thresholds[key] = threshold, torch.arange(1, num_experts + 1, dtype=torch.int16, device=device)
        return self._thresholds[key]


@dataclass(frozen=True)
class Replay(Rule):
    """Impose the routing that was recorded in one run on another, forward pass by forward pass.

        with BHRoutingIntegration(model, alpha=0.05) as bh:
            model(**inputs)
        with RoutingPatch(model, Replay(bh.records)):
            model(**inputs)  # the same logits, bit for bit

    Whenever the rule is put into a model it begins with the first recorded pass (`rewind`), and goes on to the next one
    when a pass comes to its end; one that is aborted is repeated. Passes are told apart by their order alone: one
    thread at a time, and no gradient checkpointing, which runs layers again after the end of their pass.

    Parameters
    ----------
    records : Records
        What a patch has recorded, in either mode (`bhlib.records`).
    weights : {"model", "recorded"}
        ``"model"`` computes the weights of the recorded experts from the logits of the moment, by the model's
        convention; ``"recorded"`` imposes the recorded weights too.

    Raises
    ------
    ValueError
        If the recording was cut short by its bound, or has other layers, experts or tokens than the model is run on.
    RuntimeError
        If the model is run for more passes than were recorded.
    """

    records: object = field(repr=False)
    weights: str = "model"
    _number: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.weights not in ("model", "recorded"):
            raise ValueError(f"weights must be 'model' or 'recorded', got {self.weights!r}.")
        if self.records.truncated:
            raise ValueError(
                f"The recording was cut short by max_recorded_tokens={self.records.max_tokens} and cannot be replayed: "
                f"record with max_recorded_tokens=None."
            )
        if not self.records.passes:
            raise ValueError("The recording is empty: run the model inside the patch first.")
        slots = [routing.experts.shape[-1] for one in self.records.passes for routing in one.routings.values()]
        object.__setattr__(self, "min_k", 0)
        object.__setattr__(self, "max_k", max(slots))

    def rewind(self) -> None:
        """Begin with the first recorded pass again."""
        object.__setattr__(self, "_number", 0)

    def end_pass(self) -> None:
        """Go on to the next recorded pass."""
        object.__setattr__(self, "_number", self._number + 1)

    def check_num_experts(self, num_experts: int) -> None:
        if num_experts != self.records.num_experts:
            raise ValueError(
                f"The routing of {self.records.num_experts} experts cannot be replayed on {num_experts}: "
                f"record it with the same model."
            )

    def check_model(self, num_layers: int, num_experts: int) -> None:
        super().check_model(num_layers, num_experts)
        if num_layers != self.records.num_layers:
            raise ValueError(
                f"The routing of {self.records.num_layers} MoE layers cannot be replayed on {num_layers}: "
                f"record it with the same model."
            )

    def __call__(
        self,
        router_logits: Tensor,
        layer: int | None = None,
        *,
        weighting: str = "softmax",
        temperature: float = 1.0,
    ) -> Routing:
        if self.weights == "model":
            return super().__call__(router_logits, layer, weighting=weighting, temperature=temperature)
        self.check_num_experts(router_logits.shape[-1])
        return self._recorded(router_logits, layer)

    def select(self, router_logits: Tensor, scores: Tensor, layer: int | None) -> tuple[Tensor, Tensor]:
        _, experts, counts = self._recorded(router_logits, layer)
        return experts.clamp(min=0), counts

    def _recorded(self, router_logits: Tensor, layer: int | None) -> Routing:
        """Decisions of a layer in the recorded pass that is being repeated, on the device of the logits."""
        number, passes = self._number, self.records.passes
        if number == len(passes):
            raise RuntimeError(
                f"The recording holds {len(passes)} forward passes, and MoE layer {layer} is run once more: record as "
                f"many passes as are replayed, or call rewind() to begin anew."
            )
        if layer not in passes[number].routings:
            raise ValueError(f"The recorded forward pass {number} has no MoE layer {layer}.")
        routing = passes[number].routings[layer]
        if len(routing.counts) != len(router_logits):
            raise ValueError(
                f"The recorded forward pass {number} routed {len(routing.counts)} tokens, and now there are "
                f"{len(router_logits)}: replay on the inputs that were recorded."
            )
        device = router_logits.device
        return Routing(
            routing.weights.to(device), routing.experts.to(device, torch.int64), routing.counts.to(device, torch.int64)
        )


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
    return_stats: bool = False,
) -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, dict]:
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
        with exactly so many experts; and ``alpha``, ``temperature``, ``min_k``, ``max_k`` as given. Of no tokens, NaN,
        and None for the least and the most.

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
    # Not view(*lead, -1): of no tokens the number of slots could be any.
    return dense.view(router_logits.shape), experts.view(*lead, experts.shape[-1]), counts.view(lead)
