"""Rules that know more of layers and experts than the router says: what each is worth, or can amplify.

`bhlib.rival_fits` finds these numbers, from a calibration text or from the experts' own matrices.
"""

import numbers
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bhlib.rules.base import Level, ProbabilityRule, Rule
from bhlib.weighting import probabilities


@dataclass(frozen=True)
class MoDES(ProbabilityRule):
    """Keep every expert whose probability, times the importance of its layer, is at least `threshold`.

    Huang et al. 2025 (arXiv:2511.15690), for models of text and images, with a threshold for each; of text alone there
    is one. The importance of a layer is the divergence of the prediction from the model's own where all experts of that
    layer are skipped (`bhlib.rival_fits.layer_importance`).

    Parameters
    ----------
    threshold : float
        In [0, 1].
    importance : sequence of float
        A positive number for each MoE layer, in order of depth; the rule depends on their ratios and on the threshold.
    """

    threshold: Level = 0.05
    importance: tuple[float, ...] = ()

    level_name = "threshold"

    def __post_init__(self) -> None:
        importance = tuple(self.importance)
        if not importance or not all(isinstance(one, numbers.Real) and 0 < one < float("inf") for one in importance):
            raise ValueError(
                f"importance must hold one number above 0 per MoE layer, got {importance}: "
                f"bhlib.rival_fits.layer_importance measures them."
            )
        object.__setattr__(self, "importance", importance)
        super().__post_init__()

    def _check_level(self, level: float) -> None:
        _check_fraction("threshold", level)

    def check_model(self, num_layers: int, num_experts: int) -> None:
        super().check_model(num_layers, num_experts)
        if num_layers != len(self.importance):
            raise ValueError(
                f"importance has {len(self.importance)} entries for a model of {num_layers} MoE layers: give one for "
                f"each layer."
            )

    def count(self, top: Tensor, probs: Tensor, layer: int | None) -> Tensor:
        return (self.importance[_checked_layer(layer, len(self.importance))] * top >= self.level_for(top)).sum(dim=-1)


@dataclass(frozen=True)
class ACE(Rule):
    """Of the model's own top-k, keep the best, and those of which one of two views says that they contribute.

    Xu et al. 2026 (arXiv:2609.05228). A view is the probability times what the expert amplifies, divided by the sum
    over the top-k: "GSP" knows it from the norms of the expert's matrices, "RCR" from what the expert makes of the
    direction that the router looks for. What counts is the larger of the two, RCR's times `refinement`: the paper's
    formula has 1, the code that its authors published 0.1. The paper divides the weights of what is kept by their sum;
    here they are the model's, as for every rule.

    Parameters
    ----------
    threshold : float
        In [0, 1].
    amplification, along_router : Tensor [layers, experts]
        Of each expert, from `bhlib.rival_fits.expert_gains`.
    refinement : float
    """

    threshold: Level = 0.1
    amplification: Tensor = field(default=None, repr=False, compare=False)  # type: ignore[assignment]
    along_router: Tensor = field(default=None, repr=False, compare=False)  # type: ignore[assignment]
    refinement: float = 0.1

    level_name = "threshold"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("amplification", "along_router"):
            table = getattr(self, name)
            if not isinstance(table, Tensor) or table.dim() != 2 or not (table > 0).all():
                raise ValueError(
                    f"{name} must be a Tensor [layers, experts] of numbers above 0, such as bhlib.rival_fits."
                    f"expert_gains gives, got {table if table is None else tuple(getattr(table, 'shape', ()))}."
                )

    def _check_level(self, level: float) -> None:
        _check_fraction("threshold", level)

    def check_model(self, num_layers: int, num_experts: int) -> None:
        super().check_model(num_layers, num_experts)
        if self.amplification.shape != (num_layers, num_experts):
            raise ValueError(
                f"amplification is of {tuple(self.amplification.shape)} layers and experts, but the model has "
                f"{num_layers} and {num_experts}: find it for this model, bhlib.rival_fits.expert_gains(model)."
            )

    def select(self, router_logits: Tensor, scores: Tensor, layer: int | None) -> tuple[Tensor, Tensor]:
        layer = _checked_layer(layer, len(self.amplification))
        own = torch.topk(scores, self.max_k, dim=-1).indices
        gates = probabilities(router_logits).gather(-1, own)
        views = [gates * table[layer].to(gates)[own] for table in (self.amplification, self.along_router)]
        spectral, routed = (view / view.sum(dim=-1, keepdim=True) for view in views)
        view = torch.maximum(spectral, self.refinement * routed)
        view[:, 0] = torch.inf  # the best is always kept
        order = view.argsort(dim=-1, descending=True, stable=True)
        counts = (view >= self.level_for(view)).sum(dim=-1).clamp(self.min_k, self.max_k)
        return own.gather(-1, order), counts


def _check_fraction(name: str, level: float) -> None:
    if isinstance(level, bool) or not isinstance(level, numbers.Real) or not 0 <= level <= 1:
        raise ValueError(f"{name} must be a number in [0, 1], got {level!r}.")


def _checked_layer(layer: int | None, num_layers: int) -> int:
    if layer is None or not 0 <= layer < num_layers:
        raise ValueError(f"layer must lie in 0..{num_layers - 1}, since the rule differs by layer, got {layer}.")
    return layer
