"""Rivals: what people use, under the same interface. Each but `KeepMass` keeps a prefix of the token's best experts."""

import numbers
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from bhlib import kernels
from bhlib.procedures import is_whole
from bhlib.rules.base import Level, PrefixRule, ProbabilityRule, Routing, Rule, TopK, by_token, each


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
class _FractionRule(ProbabilityRule):
    """A rule whose level is a number in [0, 1]."""

    def _check_level(self, level: float) -> None:
        if isinstance(level, bool) or not isinstance(level, numbers.Real) or not 0 <= level <= 1:
            raise ValueError(f"{self.level_name} must be a number in [0, 1], got {level!r}.")


@dataclass(frozen=True)
class Threshold(_FractionRule):
    """Keep every expert with a probability of at least `threshold`.

    One constant for all tokens, where the top-any gating of DynMoE (Guo et al. 2024, arXiv:2405.14297) trains one per
    expert. It is also `BH` with ``method="fixed"`` and ``DirichletNull(1)``, at alpha = (1 - threshold)^(experts - 1).
    """

    threshold: Level = 0.05
    _cuts: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    level_name = "threshold"

    def count(self, top: Tensor, probs: Tensor, layer: int | None) -> Tensor:
        return (top >= self.level_for(top)).sum(dim=-1)

    def prepare(self, num_experts: int, layer: int, device: torch.device) -> None:
        super().prepare(num_experts, layer, device)
        self.kernel_cuts(num_experts, layer, device)

    def kernel_cuts(self, num_experts: int, layer: int | None, device: torch.device) -> tuple[str, int, Tensor] | None:
        """The same cut for every rank; computed once."""
        key = num_experts, str(device)
        if key not in self._cuts:
            cuts = None
            if kernels.run_on(device) and num_experts <= kernels.MOST_EXPERTS:
                levels = torch.tensor(self.threshold, dtype=torch.float32, device=device)
                cuts = levels[..., None].expand(*levels.shape, num_experts).contiguous()
            self._cuts[key] = cuts
        return None if self._cuts[key] is None else ("prob", 0, self._cuts[key])

    def _prepare_like(self, other: Self) -> None:
        super()._prepare_like(other)
        for num_experts, device in other._cuts:
            self.kernel_cuts(num_experts, None, torch.device(device))


@dataclass(frozen=True)
class TopP(_FractionRule):
    """Keep the fewest experts whose probabilities add up to at least `p`.

    Huang et al. 2024, "Harder tasks need more experts: dynamic routing in MoE models" (arXiv:2403.07652), there with a
    router that is trained for it.
    """

    p: Level = 0.4

    level_name = "p"

    def count(self, top: Tensor, probs: Tensor, layer: int | None) -> Tensor:
        mass_before = top.cumsum(dim=-1) - top
        return (mass_before < self.level_for(top)).sum(dim=-1)


@dataclass(frozen=True)
class MinP(_FractionRule):
    """Keep the experts with a probability above `ratio` times that of the best one, and at least `min_k`.

    The min-p of sampling (Nguyen et al. 2024, arXiv:2407.01082), applied to experts as "smart expert reduction" in
    ik_llama.cpp (pull request 239, 2025), whose ``-ser K,t`` is ``MinP(t, min_k=K)``.
    """

    ratio: Level = 0.3

    level_name = "ratio"

    def count(self, top: Tensor, probs: Tensor, layer: int | None) -> Tensor:
        return (top > self.level_for(top) * top[:, :1]).sum(dim=-1)


@dataclass(frozen=True)
class WeightRatio(_FractionRule):
    """Keep the next expert while its probability is at least `beta` times the sum of those kept before it.

    Expert skipping of NAEE (Lu et al. 2024, "Not all experts are equal", arXiv:2402.14800) is defined for two experts:
    the second is skipped if w_2 < beta w_1. Comparing with the sum of all that are kept already says the same for two
    and extends it to any number. The ratio falls with the rank, so that the experts kept are a prefix.
    """

    beta: Level = 0.2

    level_name = "beta"

    def count(self, top: Tensor, probs: Tensor, layer: int | None) -> Tensor:
        kept_before = top.cumsum(dim=-1) - top
        return (top >= self.level_for(top) * kept_before).sum(dim=-1)


@dataclass(frozen=True)
class EntropyK(ProbabilityRule):
    """More experts where the router hesitates: k is a step function of the entropy of its probabilities.

    Adaptive-K (Balsamo 2026, doi:10.5281/zenodo.18282008): per token, k = 1 below the first entropy threshold and a
    larger k beyond each further one. Its thresholds are tuned per model; here, `bhlib.levels.entropy_thresholds`
    takes them from calibration data.

    Parameters
    ----------
    thresholds : sequence of float, increasing
        Entropies in nats, at most log(experts); or one such sequence for each sequence of a batch.
    ks : sequence of int, one more than `thresholds`
        ``ks[i]`` experts for a token whose entropy exceeds i of the thresholds: ``ks[-1]`` if all.
    """

    thresholds: tuple[Any, ...] = (2.0, 2.5)
    ks: tuple[int, ...] = (2, 4, 8)

    level_name = "first_threshold"
    _upper_bound = "ks"

    def __post_init__(self) -> None:
        thresholds, ks = tuple(self.thresholds), tuple(self.ks)
        if thresholds and isinstance(thresholds[0], Sequence):
            thresholds = tuple(tuple(row) for row in thresholds)
        object.__setattr__(self, "thresholds", thresholds)
        for row in self._rows():
            if len(ks) != len(row) + 1:
                raise ValueError(
                    f"ks must have one entry more than thresholds, got {len(ks)} and {len(row)}: ks={ks}, "
                    f"thresholds={row}."
                )
            if list(row) != sorted(row):
                raise ValueError(f"thresholds must be increasing, got {row}.")
        if not all(is_whole(k) and k >= 1 for k in ks):
            raise ValueError(f"ks must hold ints of 1 or more, got {ks}.")
        ks = tuple(map(int, ks))
        for name, value in (("ks", ks), ("min_k", min(ks)), ("max_k", max(ks))):
            object.__setattr__(self, name, value)

    @property
    def first_threshold(self) -> float | tuple[float, ...]:
        """The least entropy that gives more than ``ks[0]`` experts, in nats: the level, which all thresholds follow."""
        rows = self._rows()
        return tuple(row[0] for row in rows) if self._differ() else rows[0][0]

    def at(self, level: Level) -> Self:
        """The same rule with its first threshold at `level`, the others as far from that as in the first sequence."""
        levels = self._checked(level)
        first, *others = self._rows()[0]
        rows = [(one, *(other + (one - first) for other in others)) for one in each(levels)]
        thresholds = tuple(rows) if isinstance(levels, tuple) else rows[0]
        moved = replace(self, thresholds=thresholds)
        moved._prepare_like(self)
        return moved

    def _differ(self) -> bool:
        """Whether the thresholds differ by sequence."""
        return bool(self.thresholds) and isinstance(self.thresholds[0], tuple)

    def _rows(self) -> tuple[tuple[float, ...], ...]:
        """The thresholds of each sequence, or those of all."""
        return self.thresholds if self._differ() else (self.thresholds,)

    def _level_values(self) -> tuple:
        return self.thresholds

    def count(self, top: Tensor, probs: Tensor, layer: int | None) -> Tensor:
        entropy = torch.special.entr(probs).sum(dim=-1)
        thresholds = self._level_tensor(entropy.dtype, entropy.device)
        if thresholds.dim() == 2:
            thresholds = by_token(thresholds, len(entropy))
        exceeded = ~(entropy[:, None] <= thresholds)  # NaN exceeds all
        return torch.tensor(self.ks, device=entropy.device)[exceeded.sum(dim=-1)]


@dataclass(frozen=True)
class KeepMass(Rule):
    """The experts of another rule, with weights that add up to what those of the model's own top-k would.

    Parameters
    ----------
    rule : Rule
        Which experts; at least one per token.
    top_k : int
        Experts per token of the model itself.
    """

    rule: Rule
    top_k: int = 8

    def __post_init__(self) -> None:
        if type(self.rule).begin_pass is not Rule.begin_pass:
            raise ValueError(
                f"{self.rule!r} has to be told of passes, and cannot stand inside {type(self).__name__}: use it alone."
            )
        object.__setattr__(self, "min_k", self.rule.min_k)
        object.__setattr__(self, "max_k", self.rule.max_k)
        object.__setattr__(self, "level_name", self.rule.level_name)
        super().__post_init__()

    @property
    def level(self) -> Any:
        return self.rule.level

    def at(self, level: Level) -> Self:
        return replace(self, rule=self.rule.at(level))

    def prepare(self, num_experts: int, layer: int, device: torch.device) -> None:
        self.rule.prepare(num_experts, layer, device)

    def _settle_level(self) -> None:
        """The rule inside has."""

    def _route(
        self,
        router_logits: Tensor,
        layer: int | None,
        weighting: str,
        temperature: float,
        empty: int,
        log_norms: Tensor | None = None,
    ) -> Routing:
        routing = self.rule._route(router_logits, layer, weighting, temperature, empty, log_norms)
        own = TopK(self.top_k)(router_logits, layer, weighting=weighting, temperature=temperature)
        factor = own.weights.sum(dim=-1, keepdim=True) / routing.weights.sum(dim=-1, keepdim=True)
        return routing._replace(weights=routing.weights * factor)

    def check_model(self, num_layers: int, num_experts: int) -> None:
        self.rule.check_model(num_layers, num_experts)
