"""Rules that change the weights of what another rule keeps, to make up for what it drops.

A compensation makes up for the same experts, with weights that are the model's (`bhlib.compensation`), so that the two
exclude each other.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bhlib.procedures import is_whole
from bhlib.rules.base import Forms, Routing
from bhlib.rules.rivals import KeepMass
from bhlib.weighting import find_weighting, probabilities


class _InOwn(NamedTuple):
    """What a rule kept, and the model's own top-k of the same tokens.

    Attributes
    ----------
    kept : Routing
        With the weights that the model itself gives to its own experts, whatever was dropped.
    own, weights : Tensor [tokens, top_k]
        The model's own experts, and their weights.
    same : Tensor [tokens, top_k, slots], bool
        Whether an expert of the model's own is in a slot.
    """

    kept: Routing
    own: Tensor
    weights: Tensor
    same: Tensor


@dataclass(frozen=True)
class _Reweighted(KeepMass):
    """Around another rule, as `KeepMass`."""

    def forms(self, *args: Any, own_k: int = 0, **options: Any) -> Forms:
        if own_k:
            raise ValueError(
                f"{type(self).__name__} makes up for dropped experts by other weights, and a compensation keeps the "
                f"model's: use {type(self).__name__} without compensation, or its rule, {self.rule!r}, with one."
            )
        return super().forms(*args, **options)

    def _in_own(
        self, router_logits: Tensor, layer: int | None, weighting: str, temperature: float, empty: int, *others: Any
    ) -> _InOwn:
        kept = self.rule._route(router_logits, layer, weighting, temperature, empty, *others)
        convention = find_weighting(weighting)
        scores, own = convention.scores(router_logits, temperature).topk(self.top_k, dim=-1)
        weights = convention.weights(scores, torch.ones_like(own, dtype=torch.bool))
        same = own[:, :, None] == kept.experts[:, None, :]
        as_own = (weights[:, :, None] * same).sum(dim=1)
        return _InOwn(kept._replace(weights=torch.where(same.any(dim=1), as_own, kept.weights)), own, weights, same)


@dataclass(frozen=True)
class Halving(_Reweighted):
    """The experts of another rule, with weights normalized over the `reference` best instead of over what is kept.

    Chen and Yao 2026, "Training-free halving of activated experts" (arXiv:2609.04575), where the rule is static top-k
    and the model divides its weights by their sum: of what it was trained with, or of more, 16 for 8. A model that does
    not divide, as OLMoE, has no such sum. What carries over is the ratio to the weights that the model was trained
    with: the probabilities of its top-k over those of the `reference` best. With ``reference=top_k`` the weights are
    the model's own.

    Parameters
    ----------
    rule : Rule
        Which experts.
    top_k : int
        Experts per token of the model itself.
    reference : int
        1 or more; no more than there are experts.
    """

    reference: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_whole(self.reference) or self.reference < 1:
            raise ValueError(f"reference must be an int of 1 or more, got {self.reference!r}.")

    def check_model(self, num_layers: int, num_experts: int) -> None:
        super().check_model(num_layers, num_experts)
        if self.reference > num_experts:
            raise ValueError(f"reference must not exceed the number of experts, {num_experts}, got {self.reference}.")

    def _route(
        self, router_logits: Tensor, layer: int | None, weighting: str, temperature: float, empty: int, *others: Any
    ) -> Routing:
        kept = self._in_own(router_logits, layer, weighting, temperature, empty, *others).kept
        mass = probabilities(router_logits).topk(max(self.top_k, self.reference), dim=-1).values.cumsum(dim=-1)
        factor = mass[:, self.top_k - 1] / mass[:, self.reference - 1]
        return kept._replace(weights=kept.weights * factor[:, None])


@dataclass(frozen=True)
class ExFold(_Reweighted):
    """The experts of another rule, and each that it drops folded into that one of them that is most like it.

    "ExFold" (arXiv:2608.24938, with code by its authors), for the reading of a text: its rule is static top-k. In place
    of a dropped expert i its weight, times a number s(i, j), is added to the weight of the kept expert j for which
    s(i, j) times the output of j comes nearest to the output of i on calibration text
    (`bhlib.rival_fits.fit_folding`). (In decoding it also chooses which experts a batch loads; that is not here.)

    Parameters
    ----------
    rule : Rule
        Which experts.
    top_k : int
        Experts per token of the model itself.
    scales, losses : Tensor [layers, experts, experts]
        s(i, j), and the part of the output of i that it leaves, as a share of its energy; infinite for pairs never seen
        together.
    """

    scales: Tensor = field(default=None, repr=False, compare=False)  # type: ignore[assignment]
    losses: Tensor = field(default=None, repr=False, compare=False)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("scales", "losses"):
            table = getattr(self, name)
            if not isinstance(table, Tensor) or table.dim() != 3 or table.shape[1] != table.shape[2]:
                raise ValueError(
                    f"{name} must be a Tensor [layers, experts, experts] such as bhlib.rival_fits.fit_folding gives, "
                    f"got {table if table is None else tuple(getattr(table, 'shape', ()))}."
                )

    def check_model(self, num_layers: int, num_experts: int) -> None:
        super().check_model(num_layers, num_experts)
        if self.scales.shape[:2] != (num_layers, num_experts):
            raise ValueError(
                f"scales are of {tuple(self.scales.shape[:2])} layers and experts, but the model has {num_layers} and "
                f"{num_experts}: fit them on this model, bhlib.rival_fits.fit_folding(model, token_ids)."
            )

    def _route(
        self, router_logits: Tensor, layer: int | None, weighting: str, temperature: float, empty: int, *others: Any
    ) -> Routing:
        if layer is None or not 0 <= layer < len(self.scales):
            raise ValueError(f"layer must lie in 0..{len(self.scales) - 1}, since scales differ by layer, got {layer}.")
        kept, own, weights, same = self._in_own(router_logits, layer, weighting, temperature, empty, *others)
        device, filled = router_logits.device, torch.arange(kept.experts.shape[1], device=router_logits.device)
        filled = filled < kept.counts[:, None]
        slot_expert = kept.experts.masked_fill(~filled, 0)
        loss = self.losses[layer].to(device)[own[:, :, None], slot_expert[:, None, :]]
        loss, target = loss.masked_fill(~filled[:, None, :], torch.inf).min(dim=-1)  # the slot that each is folded into
        scale = self.scales[layer].to(device)[own, slot_expert.gather(1, target)].to(weights)
        folds = ~same.any(dim=2) & loss.isfinite()
        return kept._replace(weights=kept.weights.scatter_add(1, target, weights * scale * folds))
